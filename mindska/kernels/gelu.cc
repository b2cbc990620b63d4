// GELU and its gradient.
#include "activation.h"

MINDSKA_OPERATOR(mindska_gelu, "x (...) -> y (...)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  parallel_for_each_vector(element_count(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(y + i, gelu(load_some(x + i, count)), count);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_gelu_grad, "x (...), dy (...) -> dx (...)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *dy = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[2]);
  parallel_for_each_vector(element_count(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(dx + i, gelu_grad(load_some(x + i, count), load_some(dy + i, count)), count);
  });
  return 0;
}
