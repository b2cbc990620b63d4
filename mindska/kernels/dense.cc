// A linear layer on vectors: the classifier. For inference.
#include "simd.h"

namespace mindska {

constexpr int kRowsOfTask = 8;

// The dot product, in four sums.
static inline float dot_product(const float *a, const float *b, int64_t count) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  }
  for (; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    sums[0] += load_some(a + i, n) * load_some(b + i, n);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace mindska

MINDSKA_OPERATOR(mindska_dense, "x (B, C), weight (O, C), bias (O) -> y (B, O)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *weight = static_cast<float *>(params[1]);
  const float *bias = static_cast<float *>(params[2]);
  float *y = static_cast<float *>(params[3]);
  const int64_t batch = shapes[0][0], depth = shapes[0][1], outputs = shapes[1][0];
  parallel_for((outputs + kRowsOfTask - 1) / kRowsOfTask, batch * outputs * depth / kLanes, [&](int64_t task) {
    for (int64_t row = task * kRowsOfTask; row < std::min(outputs, (task + 1) * kRowsOfTask); ++row) {
      for (int64_t b = 0; b < batch; ++b) {
        y[b * outputs + row] = dot_product(x + b * depth, weight + row * depth, depth) + bias[row];
      }
    }
  });
  return 0;
}
