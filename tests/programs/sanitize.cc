// Runs the operators on arrays of exactly their size, over shapes that leave remainders: to be built with
// -fsanitize=address,undefined, which ends the program at the first access outside.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "batch_norm.cc"
#include "depthwise.cc"
#include "fold.cc"
#include "gate.cc"
#include "gelu.cc"
#include "grouped.cc"
#include "layer_norm.cc"
#include "max_relative.cc"
#include "mlp.cc"
#include "pointwise.cc"
#include "residual.cc"
#include "select.cc"
#include "square_sum.cc"
#include "strided.cc"

struct Array {
  std::vector<int64_t> shape;
  std::unique_ptr<float[]> data;

  explicit Array(std::vector<int64_t> dims) : shape(dims) {
    const int64_t size = mindska::size_of(shape.data(), static_cast<int>(shape.size()));
    data.reset(new float[size]);
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  }
};

using Operator = int (*)(int, void **, int *, int64_t **, const char **, void *, void *);

template <typename... Arrays>
static void run(Operator function, Arrays &...arrays) {
  void *params[] = {arrays.data.get()...};
  int64_t *shapes[] = {arrays.shape.data()...};
  int ndims[] = {static_cast<int>(arrays.shape.size())...};
  std::vector<const char *> types(sizeof...(arrays), "float32");
  if (function(sizeof...(arrays), params, ndims, shapes, types.data(), nullptr, nullptr)) std::exit(2);
}

static Array integers(std::initializer_list<int32_t> values) {
  Array array({static_cast<int64_t>(values.size())});
  std::memcpy(array.data.get(), values.begin(), values.size() * sizeof(int32_t));
  return array;
}

int main() {
  for (int64_t size : {1, 15, 16, 17, 16384, 16385}) {
    Array x({size}), dy({size}), y({size});
    Array total({1});
    run(mindska_gelu, x, y);
    run(mindska_square_sum, x, total, x, total);
    run(mindska_gelu_grad, x, dy, y);
    Array dx({size});
    run(mindska_gate, x, dy, y);
    run(mindska_gate_grad, x, dy, y, dx, y);
  }
  const int64_t planes[][4] = {{1, 1, 1, 1}, {2, 3, 7, 7}, {1, 2, 1, 70}, {1, 2, 70, 1}, {1, 3, 33, 129}};
  const int64_t kernels[][3] = {{3, 3, 1}, {7, 7, 3}, {1, 17, 3}, {17, 1, 3}, {5, 5, 2}, {1, 3, 1}};
  for (auto &p : planes) {
    for (auto &k : kernels) {
      Array x({p[0], p[1], p[2], p[3]}), y(x.shape), dx(x.shape), weight({p[1], 1, k[0], k[1]}), bias({p[1]});
      Array dweight(weight.shape), dbias(bias.shape), dilation = integers({static_cast<int32_t>(k[2])});
      run(mindska_depthwise, x, weight, bias, dilation, y);
      run(mindska_depthwise_grad, x, weight, dilation, y, dx, dweight, dbias);
      Array before(x.shape), gamma({p[1]}), dgamma({p[1]}), eps({1});
      Array options({3}), mean({p[1]}), inverse({p[1]}), running({p[1]}), other({p[1]});
      run(mindska_batch_norm, x, gamma, bias, dbias, dgamma, options, y, mean, inverse, running, other);
      run(mindska_batch_norm_grad, x, gamma, mean, inverse, y, options, before, dx, dgamma, dbias);
      run(mindska_layer_norm, x, gamma, bias, eps, y);
      run(mindska_layer_norm_grad, x, gamma, eps, y, dx, dgamma, dbias);
      Array one({1}), keep({p[0]});
      run(mindska_residual, x, dx, y, gamma, keep, before);
      run(mindska_residual, x, one, one, gamma, one, before);
      run(mindska_residual_grad, x, dx, gamma, keep, y, before, dgamma);
      run(mindska_residual_grad, x, one, gamma, one, y, before, dgamma);
      run(mindska_depthwise_gelu, x, weight, bias, dilation, y);
      run(mindska_depthwise_gelu_keeping, x, weight, bias, dilation, y, before);
      run(mindska_depthwise_gelu_grad, x, weight, dilation, y, before, dx, dweight, dbias);
    }
  }
  const int64_t products[][6] = {  // batch, channels in and out, height, width, groups
      {1, 1, 1, 1, 1, 1}, {2, 5, 7, 3, 3, 1}, {3, 20, 12, 7, 7, 4}, {1, 90, 100, 1, 97, 1}, {20, 16, 24, 1, 1, 2}};
  for (auto &p : products) {
    Array x({p[0], p[1], p[3], p[4]}), y({p[0], p[2], p[3], p[4]}), dx(x.shape), weight({p[2], p[1] / p[5], 1, 1});
    Array bias({p[2]}), dweight(weight.shape), dbias(bias.shape), other(y.shape);
    Array scale({p[1] / p[5]}), shift(scale.shape), mean(scale.shape), variance(scale.shape), eps({1});
    run(mindska_affine, scale, shift, mean, variance, eps, mean, variance);
    run(mindska_behind, weight, bias, scale, shift, dweight, dbias);
    run(mindska_pointwise, x, weight, bias, y);
    run(mindska_pointwise_grad, x, weight, y, dx, dweight, dbias);
    for (int32_t kind = 0; kind < 7; ++kind) {
      Array number = integers({kind});
      run(mindska_pointwise_then, x, weight, bias, dbias, other, number, y);
    }
  }
  const int64_t strides[][8] = {  // batch, channels in and out, height, width, kernel, stride, dilation
      {1, 1, 1, 1, 1, 3, 2, 1}, {2, 3, 8, 33, 20, 7, 4, 1}, {3, 8, 12, 9, 8, 3, 2, 2}, {2, 20, 90, 1, 70, 1, 2, 1},
      {70, 6, 6, 3, 2, 3, 4, 1}, {1, 6, 5, 2, 100, 5, 3, 3}};
  for (auto &c : strides) {
    Array x({c[0], c[1], c[3], c[4]}), y({c[0], c[2], (c[3] + c[6] - 1) / c[6], (c[4] + c[6] - 1) / c[6]}), dx(x.shape);
    Array weight({c[2], c[1], c[5], c[5]}), bias({c[2]}), dweight(weight.shape), dbias(bias.shape);
    Array options = integers({static_cast<int32_t>(c[6]), static_cast<int32_t>(c[7]), 1});
    run(mindska_strided, x, weight, bias, options, y);
    run(mindska_strided_input_grad, x, weight, options, y, dx);
    run(mindska_strided_weight_grad, x, weight, options, y, dweight, dbias);
  }
  const int64_t convolutions[][8] = {  // batch, channels in and out, height, width, groups, kernel, dilation
      {1, 4, 6, 1, 1, 2, 3, 2}, {2, 8, 8, 7, 7, 2, 3, 1}, {1, 15, 9, 5, 30, 3, 5, 2}};
  for (auto &c : convolutions) {
    Array x({c[0], c[1], c[3], c[4]}), y({c[0], c[2], c[3], c[4]}), dx(x.shape), weight({c[2], c[1] / c[5], c[6], c[6]});
    Array bias({c[2]}), dweight(weight.shape), dbias(bias.shape), options = integers({static_cast<int32_t>(c[7]), 1});
    run(mindska_grouped, x, weight, bias, options, y);
    run(mindska_grouped_grad, x, weight, options, y, dx, dweight, dbias);
    Array second(x.shape), mean({c[0], c[1], 1, 1}), weights({c[0], 2, c[1]}), dsecond(x.shape), dweights(weights.shape);
    run(mindska_fuse, x, second, mean);
    run(mindska_select, x, second, weights, dx);
    run(mindska_select_grad, x, second, weights, dsecond, dx, second, dweights);
  }
  const int64_t mlps[][5] = {{1, 3, 5, 1, 1}, {2, 5, 70, 7, 9}, {1, 16, 33, 40, 130}, {1, 9, 33, 130, 33}};
  for (auto &m : mlps) {
    Array x({m[0], m[1], m[3], m[4]}), y(x.shape), shortcut(x.shape), weight1({m[2], m[1], 1, 1}), bias1({m[2]});
    Array taps({m[2], 1, 3, 3}), bias({m[2]}), weight2({m[1], m[2], 1, 1}), bias2({m[1]}), scale({m[1]});
    Array dx(x.shape), dweight1(weight1.shape), dbias1(bias1.shape), dtaps(taps.shape), dbias(bias.shape);
    Array dweight2(weight2.shape), dbias2(bias2.shape);
    run(mindska_mlp, x, weight1, bias1, taps, bias, weight2, bias2, y);
    run(mindska_mlp_added, x, weight1, bias1, taps, bias, weight2, bias2, scale, shortcut, y);
    run(mindska_mlp_grad, x, weight1, bias1, taps, bias, weight2, y, dx, dweight1, dbias1, dtaps, dbias, dweight2, dbias2);
  }
  for (int64_t channels : {8, 24}) {
    Array x({2, channels, 5, 7}), y(x.shape), dx(x.shape), options = integers({2, 3, 1});
    Array weight1({channels * 3 / 8, 1, 5, 5}), bias1({channels * 3 / 8}), weight2({channels / 2, 1, 7, 7});
    Array bias2({channels / 2}), dweight1(weight1.shape), dbias1(bias1.shape), dweight2(weight2.shape), dbias2(bias2.shape);
    run(mindska_split_depthwise, x, weight1, bias1, weight2, bias2, options, y);
    run(mindska_split_depthwise_grad, x, weight1, weight2, options, y, dx, dweight1, dbias1, dweight2, dbias2);
  }
  const int64_t graphs[][8] = {  // batch, channels, height, width, pooled height and width, k, dilation
      {1, 8, 1, 5, 1, 5, 5, 1}, {2, 24, 9, 7, 4, 3, 5, 2}, {1, 16, 8, 8, 8, 8, 4, 3}, {3, 40, 5, 13, 5, 13, 5, 13}};
  for (auto &g : graphs) {
    Array x({g[0], g[1], g[2], g[3]}), y({g[0], g[1], g[4], g[5]}), position({g[4] * g[5], g[2] * g[3]});
    Array options = integers({static_cast<int32_t>(g[6]), static_cast<int32_t>(g[7])});
    Array z({g[0], 2 * g[1], g[2], g[3]}), index({g[0], g[2] * g[3], g[6]}), dx(x.shape), dy(y.shape);
    run(mindska_max_relative, x, y, position, options, z, index);
    run(mindska_max_relative_grad, y, index, z, options, dx, dy);
  }
  std::puts("clean");
}
