// GELU and its gradient.
#include "activation.h"

MINDSKA_OPERATOR(mindska_gelu, "x (...) -> y (...)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  in_parallel(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(y + i, gelu(load_some(x + i, count)), count);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_gelu_grad, "x (...), dy (...) -> dx (...)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *dout = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[2]);
  in_parallel(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(dx + i, gelu_gradient(load_some(x + i, count), load_some(dout + i, count)), count);
  });
  return 0;
}
