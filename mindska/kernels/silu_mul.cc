// SiLU of one tensor, a gate, times another; and its gradients.
#include "activation.h"

// y = SiLU(gate) * x
MINDSKA_OPERATOR(mindska_silu_mul, "gate (...), x (...) -> y (...)") {
  using namespace mindska;
  const float *gate = static_cast<float *>(params[0]), *x = static_cast<float *>(params[1]);
  float *y = static_cast<float *>(params[2]);
  parallel_for_each_vector(element_count(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(y + i, silu(load_some(gate + i, count)) * load_some(x + i, count), count);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_silu_mul_grad, "gate (...), x (...), dy (...) -> dgate (...), dx (...)") {
  using namespace mindska;
  const float *gate = static_cast<float *>(params[0]), *x = static_cast<float *>(params[1]);
  const float *dy = static_cast<float *>(params[2]);
  float *dgate = static_cast<float *>(params[3]), *dx = static_cast<float *>(params[4]);
  parallel_for_each_vector(element_count(shapes[0], ndims[0]), [=](int64_t i, int count) {
    const Vec v = load_some(gate + i, count), d = load_some(dy + i, count), s = sigmoid(v);
    store_some(dx + i, d * v * s, count);
    store_some(dgate + i, d * load_some(x + i, count) * (s + v * s * (1.0f - s)), count);
  });
  return 0;
}
