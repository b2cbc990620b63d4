// The sum of the squares of an array, for the norm of the gradients. The order of the sums depends on the size alone.
#include "simd.h"

namespace mindska {

constexpr int64_t kPart = 1 << 16;  // floats that a thread takes at once

}  // namespace mindska

// Inputs x; outputs sum (1,).
MINDSKA_OPERATOR(mindska_square_sum) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  const int64_t size = size_of(shapes[0], ndims[0]), parts = (size + kPart - 1) / kPart;
  std::vector<double> sums(parts);
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const float *from = x + part * kPart;
    Vec total = {};
    for_each_vector(std::min(kPart, size - part * kPart), [&](int64_t i, int n) {
      const Vec v = load_some(from + i, n);
      total += v * v;
    });
    sums[part] = sum(total);
  }
  double result = 0;
  for (double part : sums) result += part;
  *static_cast<float *>(params[1]) = static_cast<float>(result);
  return 0;
}
