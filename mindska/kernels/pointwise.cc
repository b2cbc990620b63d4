// The 1x1 convolution, in groups or not, with its bias, and what may come after it; and its gradients.
#include "activation.h"
#include "matrix.h"

namespace mindska {

// The sizes and the weights of a 1x1 convolution in groups.
struct Pointwise {
  int64_t groups, rows, depth;
  const float *weight;

  Pointwise(const int64_t *x, const void *weight, const int64_t *shape)
      : groups(x[1] / shape[1]), rows(shape[0] / groups), depth(shape[1]), weight(static_cast<const float *>(weight)) {}

  // Of all groups; those of one begin at a block.
  Weights weights() const {
    const int64_t padded = Weights::padded(rows);
    return Weights(groups * padded, depth, [=](int64_t row, int64_t k) {
      return row % padded < rows ? weight[(row / padded * rows + row % padded) * depth + k] : 0;
    });
  }

  Weights turned() const {
    const int64_t padded = Weights::padded(depth);
    return Weights(groups * padded, rows, [=](int64_t row, int64_t k) {
      return row % padded < depth ? weight[(row / padded * rows + k) * depth + row % padded] : 0;
    });
  }

  // All groups' products. finish(columns, row, vector, value). To be called from within a parallel region.
  template <typename Finish>
  void multiply_all(const Weights &weights, int64_t rows, const void *x, const int64_t *shape, Finish finish) const {
    for (int64_t group = 0; group < groups; ++group) {
      multiply(weights.part(group * Weights::padded(rows), rows), Maps(x, shape, group * weights.depth),
               [&](const Columns &columns, int64_t row, int vector, Vec value) {
                 finish(columns, group * rows + row, vector, value);
               });
    }
  }
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_pointwise,
                 "x (B, C, H, W), weight (O, D, 1, 1), bias (O) -> y (B, O, H, W) where C % D == 0, O % (C / D) == 0") {
  using namespace mindska;
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const float *bias = static_cast<float *>(params[2]);
  const Maps y(params[3], shapes[3]);
  const Weights weights = p.weights();
#pragma omp parallel if (weights.worth(y.columns()))
  p.multiply_all(weights, p.rows, params[0], shapes[0], [&](const Columns &columns, int64_t row, int vector, Vec value) {
    columns.store_vector(y, row, vector, value + bias[row]);
  });
  return 0;
}

// With v = scale * (weight x) + shift, y by kind: 0 v, 1 GELU(v), 2 ReLU(v), 3 v + other, 4 ReLU(v + other),
// 5 SiLU(v) * other, 6 v * other: those from 3 on use `other`, which has y's shape then.
MINDSKA_OPERATOR(mindska_pointwise_then,
                 "x (B, C, H, W), weight (O, D, 1, 1), scale (O), shift (O), other (B, O, H, W) or (O), kind {kind} "
                 "-> y (B, O, H, W) where C % D == 0, O % (C / D) == 0, kind >= 0, kind <= 6, other * (kind / 3) == 0") {
  using namespace mindska;
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const float *scale = static_cast<float *>(params[2]), *shift = static_cast<float *>(params[3]);
  const int kind = *static_cast<int32_t *>(params[5]);
  const Maps y(params[6], shapes[6]), other(params[4], shapes[kind >= 3 ? 4 : 6]);
  const Weights weights = p.weights();
#pragma omp parallel if (weights.worth(y.columns()))
  p.multiply_all(weights, p.rows, params[0], shapes[0], [&](const Columns &columns, int64_t row, int vector, Vec value) {
    value = scale[row] * value + shift[row];
    if (kind == 1) value = gelu(value);
    if (kind == 3 || kind == 4) value += columns.load_vector(other, row, vector);
    if (kind == 2 || kind == 4) value = value < Vec{} ? Vec{} : value;  // NaN stays NaN
    if (kind == 5) value = silu(value) * columns.load_vector(other, row, vector);
    if (kind == 6) value *= columns.load_vector(other, row, vector);
    columns.store_vector(y, row, vector, value);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_pointwise_grad,
                 "x (B, C, H, W), weight (O, D, 1, 1), dy (B, O, H, W) -> dx (B, C, H, W), dweight (O, D, 1, 1), dbias (O) "
                 "where C % D == 0, O % (C / D) == 0") {
  using namespace mindska;
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const Maps dx(params[3], shapes[0]);
  float *dweight = static_cast<float *>(params[4]), *dbias = static_cast<float *>(params[5]);
  const Weights turned = p.turned();
#pragma omp parallel if (turned.worth(dx.columns()))
  {
    p.multiply_all(turned, p.depth, params[2], shapes[2], [&](const Columns &columns, int64_t row, int vector, Vec value) {
      columns.store_vector(dx, row, vector, value);
    });
    for (int64_t group = 0; group < p.groups; ++group) {
      const Maps x(params[0], shapes[0], group * p.depth), dy(params[2], shapes[2], group * p.rows);
      multiply_turned(dy, p.rows, x, p.depth, dweight + group * p.rows * p.depth, dbias + group * p.rows);
    }
  }
  return 0;
}
