// The sum of the squares of arrays, for the norm of the gradients. The order of the sums depends on the sizes alone.
#include "simd.h"

namespace mindska {

constexpr int64_t kPart = 1 << 16;  // floats that a thread takes at once

struct Part {
  const float *from;
  int64_t size;
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_square_sum, "tensors+ (*) -> sum (1)") {
  using namespace mindska;
  std::vector<Part> parts;
  for (int i = 0; i + 1 < nparam; ++i) {
    const int64_t size = size_of(shapes[i], ndims[i]);
    for (int64_t first = 0; first < size; first += kPart) {
      parts.push_back({static_cast<float *>(params[i]) + first, std::min(kPart, size - first)});
    }
  }
  std::vector<double> sums(parts.size());
#pragma omp parallel for schedule(static, 1)
  for (size_t i = 0; i < parts.size(); ++i) {
    Vec total = {};
    for_each_vector(parts[i].size, [&](int64_t at, int n) {
      const Vec v = load_some(parts[i].from + at, n);
      total += v * v;
    });
    sums[i] = sum(total);
  }
  double result = 0;
  for (double part : sums) result += part;
  *static_cast<float *>(params[nparam - 1]) = static_cast<float>(result);
  return 0;
}
