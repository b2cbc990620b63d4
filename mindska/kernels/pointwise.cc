// The 1x1 convolution, in groups or not, with its bias, and what may come after it; and its gradients.
#include "activation.h"
#include "matrix.h"

namespace mindska {

// The operands of one group.
struct Group {
  int64_t rows, depth;
  const float *weight;

  Group(const void *weight, const int64_t *shape, int64_t groups, int64_t group)
      : rows(shape[0] / groups), depth(shape[1]),
        weight(static_cast<const float *>(weight) + group * (shape[0] / groups) * shape[1]) {}
};

}  // namespace mindska

// Inputs x (B, C, H, W), weight (O, C / groups, 1, 1), bias (O,); outputs y (B, O, H, W).
MINDSKA_OPERATOR(mindska_pointwise) {
  using namespace mindska;
  const int64_t groups = shapes[0][1] / shapes[1][1];
  const float *bias = static_cast<float *>(params[2]);
  for (int64_t group = 0; group < groups; ++group) {
    const Group g(params[1], shapes[1], groups, group);
    const Maps x(params[0], shapes[0], group * g.depth), y(params[3], shapes[3], group * g.rows);
    const Weights weights(g.rows, g.depth, [&](int64_t row, int64_t k) { return g.weight[row * g.depth + k]; });
#pragma omp parallel
    multiply(weights, x, [&](const Columns &columns, int64_t row, int vector, Vec value) {
      columns.store_vector(y, row, vector, value + bias[group * g.rows + row]);
    });
  }
  return 0;
}

// Inputs x, weight, scale (O,), shift (O,), other (of y's shape where it is used), kind (1,) int32; outputs y.
// With v = scale * (weight x) + shift, y by kind: 0 v, 1 GELU(v), 2 ReLU(v), 3 v + other, 4 ReLU(v + other),
// 5 SiLU(v) * other, 6 v * other.
MINDSKA_OPERATOR(mindska_pointwise_then) {
  using namespace mindska;
  const int64_t groups = shapes[0][1] / shapes[1][1];
  const float *scale = static_cast<float *>(params[2]), *shift = static_cast<float *>(params[3]);
  const int kind = *static_cast<int32_t *>(params[5]);
  for (int64_t group = 0; group < groups; ++group) {
    const Group g(params[1], shapes[1], groups, group);
    const Maps x(params[0], shapes[0], group * g.depth), y(params[6], shapes[6], group * g.rows);
    const Maps other(params[4], shapes[kind >= 3 ? 4 : 6], group * g.rows);
    const Weights weights(g.rows, g.depth, [&](int64_t row, int64_t k) { return g.weight[row * g.depth + k]; });
#pragma omp parallel
    multiply(weights, x, [&](const Columns &columns, int64_t row, int vector, Vec value) {
      value = scale[group * g.rows + row] * value + shift[group * g.rows + row];
      if (kind == 1) value = gelu(value);
      if (kind == 3 || kind == 4) value += columns.load_vector(other, row, vector);
      if (kind == 2 || kind == 4) value = value < Vec{} ? Vec{} : value;  // NaN stays NaN
      if (kind == 5) value = silu(value) * columns.load_vector(other, row, vector);
      if (kind == 6) value *= columns.load_vector(other, row, vector);
      columns.store_vector(y, row, vector, value);
    });
  }
  return 0;
}

// Inputs x, weight, dy; outputs dx, dweight, dbias.
MINDSKA_OPERATOR(mindska_pointwise_grad) {
  using namespace mindska;
  const int64_t groups = shapes[0][1] / shapes[1][1];
  for (int64_t group = 0; group < groups; ++group) {
    const Group g(params[1], shapes[1], groups, group);
    const Maps x(params[0], shapes[0], group * g.depth), dx(params[3], shapes[0], group * g.depth);
    const Maps dy(params[2], shapes[2], group * g.rows);
    float *dweight = static_cast<float *>(params[4]) + group * g.rows * g.depth;
    float *dbias = static_cast<float *>(params[5]) + group * g.rows;
    const Weights turned(g.depth, g.rows, [&](int64_t row, int64_t k) { return g.weight[k * g.depth + row]; });
#pragma omp parallel
    {
      multiply(turned, dy, [&](const Columns &columns, int64_t row, int vector, Vec value) {
        columns.store_vector(dx, row, vector, value);
      });
      multiply_turned(dy, g.rows, x, g.depth, dweight, dbias);
    }
  }
  return 0;
}
