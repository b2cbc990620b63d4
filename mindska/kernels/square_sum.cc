// The sum of the squares of tensors, for the norm of the gradients. The order of the sums depends on the sizes alone.
#include "simd.h"

namespace mindska {

constexpr int64_t kSquareSumGrain = 1 << 16;  // floats of a task

struct Chunk {
  const float *from;
  int64_t size;
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_square_sum, "tensors+ (*) -> sum (1)") {
  using namespace mindska;
  std::vector<Chunk> chunks;
  for (int i = 0; i + 1 < nparam; ++i) {
    const int64_t size = element_count(shapes[i], ndims[i]);
    for (int64_t first = 0; first < size; first += kSquareSumGrain) {
      chunks.push_back({static_cast<float *>(params[i]) + first, std::min(kSquareSumGrain, size - first)});
    }
  }
  std::vector<double> sums(chunks.size());
  parallel_for(chunks.size(), kAlwaysParallel, [&](size_t i) {
    Vec total = {};
    for_each_vector(chunks[i].size, [&](int64_t at, int n) {
      const Vec v = load_some(chunks[i].from + at, n);
      total += v * v;
    });
    sums[i] = sum(total);
  });
  double result = 0;
  for (double chunk : sums) result += chunk;
  *static_cast<float *>(params[nparam - 1]) = static_cast<float>(result);
  return 0;
}
