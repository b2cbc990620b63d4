// GELU and its gradient.
#include "gelu.h"

namespace mindska {

constexpr int64_t kAtOnce = 1 << 14;  // floats a thread takes at once

// function(first, count) over the vectors of an array, by all threads.
template <typename Function>
static void in_parallel(int64_t size, Function function) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < size; start += kAtOnce) {
    for_each_vector(std::min(kAtOnce, size - start), [&](int64_t i, int count) { function(start + i, count); });
  }
}

}  // namespace mindska

// Inputs x; outputs y.
MINDSKA_OPERATOR(mindska_gelu) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  in_parallel(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(y + i, gelu(load_some(x + i, count)), count);
  });
  return 0;
}

// Inputs x, dy; outputs dx.
MINDSKA_OPERATOR(mindska_gelu_grad) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *dout = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[2]);
  in_parallel(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(dx + i, gelu_gradient(load_some(x + i, count), load_some(dout + i, count)), count);
  });
  return 0;
}
