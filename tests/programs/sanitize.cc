// Runs the operators on arrays of exactly their size, over shapes that leave remainders, then with every size, rank, type
// and number wrong, which they are to refuse: to be built with -fsanitize=address,undefined, which ends the program at the
// first access outside. Prints the operators' names. With an argument it acquires a workspace twice, which is to end it.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>

#include "batch_norm.cc"
#include "boxes.cc"
#include "dense.cc"
#include "depthwise.cc"
#include "fused_mlp.cc"
#include "gelu.cc"
#include "grouped.cc"
#include "layer_norm.cc"
#include "max_relative.cc"
#include "multi_tensor.cc"
#include "norm_folding.cc"
#include "pointwise.cc"
#include "pixel_cross_entropy.cc"
#include "pooling.cc"
#include "residual.cc"
#include "resize.cc"
#include "roi_align.cc"
#include "sequence.cc"
#include "silu_mul.cc"
#include "square_sum.cc"
#include "strided.cc"
#include "threads.cc"
#include "weighted_sum.cc"
#include "winograd.cc"

struct Array {
  std::vector<int64_t> shape;
  std::unique_ptr<float[]> data;
  std::string type = "float32";

  explicit Array(std::vector<int64_t> dims) : shape(dims), data(new float[size()]) {
    for (int64_t i = 0; i < size(); ++i) data[i] = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  }

  int64_t size() const { return mindska::element_count(shape.data(), static_cast<int>(shape.size())); }
  int64_t bytes() const { return size() * (type == "uint8" ? 1 : 4); }
};

using Entry = int (*)(int, void **, int *, int64_t **, const char **, void *, void *);

static void fail(const std::string &why) {
  std::fprintf(stderr, "FAILED: %s\n", why.c_str());
  std::exit(2);
}

// A call of an operator, whose parts can be made wrong one by one.
struct Call {
  std::string name;
  Entry function;
  std::vector<void *> data;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<std::string> types;

  int run() const {
    std::vector<void *> params = data;
    std::vector<int> ranks;
    std::vector<int64_t *> sizes;
    std::vector<const char *> names;
    for (const auto &shape : shapes) {
      ranks.push_back(static_cast<int>(shape.size()));
      sizes.push_back(const_cast<int64_t *>(shape.data()));
    }
    for (const auto &type : types) names.push_back(type.c_str());
    const int count = static_cast<int>(shapes.size());
    return function(count, params.data(), ranks.data(), sizes.data(), names.data(), nullptr, nullptr);
  }

  void refused(const std::string &why) const {
    if (run() == 0) fail(name + " took " + why);
  }

  // Every size, rank, type and number of a call that is right, made wrong.
  void check() const {
    const bool any = name == "mindska_square_sum";  // takes all sizes
    const bool in_place = name.find("multi_tensor") != std::string::npos;
    for (size_t i = 0; i < shapes.size(); ++i) {
      const std::string where = " for tensor " + std::to_string(i);
      const bool free = any && i + 1 < shapes.size();
      for (size_t j = 0; j < shapes[i].size(); ++j) {
        const int64_t size = shapes[i][j];
        for (int64_t wrong : {size - 1, size + 1, int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{1} << 40}) {
          if (wrong > 0 && wrong < INT32_MAX && (free || may_be(i, j, wrong))) continue;
          Call call = *this;
          call.shapes[i][j] = wrong;
          call.refused(std::to_string(wrong) + " in place of " + std::to_string(size) + where);
        }
      }
      const bool any_rank = free || (name == "mindska_sequence" && i > 2) ||  // weights and y, of the right size
                            (in_place && is_number_or_table(i));
      Call call = *this;
      call.shapes[i].push_back(1);
      if (!any_rank) call.refused("one more dimension" + where);
      call.shapes[i].resize(shapes[i].size() - 1);
      if (!any_rank && !(any && call.shapes[i].empty())) call.refused("one dimension less" + where);
      for (const char *type : {"float16", "float64", "int64", "bfloat16", "", types[i] == "int32" ? "float32" : "int32"}) {
        call = *this;
        call.types[i] = type;
        call.refused(std::string(type) + where);
      }
      call = *this;
      call.data[i] = nullptr;
      call.refused("no memory" + where);
    }
    Call call = *this;
    call.shapes.pop_back();
    if (!any) call.refused("a tensor less");
    call = *this;
    call.data.push_back(data[0]), call.shapes.push_back(shapes[0]), call.types.push_back(types[0]);
    if (!any) call.refused("a tensor more");
    call.shapes.clear();
    call.refused("no tensors");
  }

  // Of an update of all parameters: a tensor that stands for one number, or for learning rates.
  bool is_number_or_table(size_t tensor) const {
    if (name == "mindska_multi_tensor_average") return tensor == 0;
    const size_t numbers = name == "mindska_multi_tensor_adamw" ? 5 : 4;
    return tensor < numbers || tensor == numbers + (numbers == 5 ? 3 : 2);
  }

  // Other sizes that fit as well: an operator does not know how large the memory is.
  bool may_be(size_t tensor, size_t dimension, int64_t size) const {
    const auto is = [&](const char *other) { return name == std::string("mindska_") + other; };
    if ((is("residual") && tensor == 4) || (is("residual_grad") && tensor == 3)) {  // drop_path_mask
      return size == 1 || size == shapes[0][0];
    }
    if (is("multi_tensor_adamw")) return tensor == 8;  // any number of learning rates
    if (is("multi_tensor_momentum")) return tensor == 6;
    const bool is_pool = is("max_pool") || is("global_max_pool") || is("global_avg_pool");
    if (is_pool) return tensor == 0 && dimension > 1;  // whatever has these windows
    if (is("avg_pool")) {
      return tensor == 0 && dimension > 1 && size / *static_cast<int32_t *>(data[1]) == shapes[2][dimension];
    }
    if (is("slice_channels")) return tensor == 0 && dimension == 1;
    if (is("resize")) return tensor == 0 && dimension > 1;  // whatever has these pixels
    if (is("pixel_cross_entropy")) return tensor == 0 && dimension > 0;
    if (is("assign_max_iou")) return tensor == 1 && dimension == 1;  // any number of objects
    if (is("roi_align")) return tensor < 4 && dimension > 1;
    if (is("mask_targets")) return tensor == 0 && dimension > 0;
    if (!(is("strided") || is("strided_weight_grad")) || tensor != 0 || dimension < 2) return false;
    const int32_t stride = *static_cast<int32_t *>(data[is("strided") ? 3 : 2]);
    return (size + stride - 1) / stride == (shapes[0][dimension] + stride - 1) / stride;
  }

  // Numbers that make no sense: refused, or taken without harm.
  void check_numbers() const {
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (types[i] != "int32") continue;
      int32_t *numbers = static_cast<int32_t *>(data[i]);
      for (int64_t j = 0; j < std::min<int64_t>(shapes[i][0], 4); ++j) {
        const int32_t right = numbers[j];
        for (int32_t wrong : {0, -1, INT32_MIN, INT32_MAX}) {
          numbers[j] = wrong;
          run();
        }
        numbers[j] = right;
      }
    }
  }
};

template <typename... Arrays>
static void run(const char *name, Entry function, Arrays &...arrays) {
  Call call{name, function, {arrays.data.get()...}, {arrays.shape...}, {arrays.type...}};
  if (call.run()) fail(std::string(name) + " did not run");
  const auto content = [](const Array *array) {
    return std::string(reinterpret_cast<const char *>(array->data.get()), array->bytes());
  };
  std::vector<std::string> before;
  for (const Array *array : {&arrays...}) before.push_back(content(array));
  call.check();
  size_t i = 0;
  for (const Array *array : {&arrays...}) {
    if (before[i++] != content(array)) fail(name + std::string(" wrote"));
  }
  call.check_numbers();
  static std::set<std::string> names;
  if (names.insert(name).second) std::puts(name);
}

#define RUN(operator, ...) run(#operator, operator, __VA_ARGS__)

static Array integers(std::initializer_list<int32_t> values) {
  Array array({static_cast<int64_t>(values.size())});
  array.type = "int32";
  std::memcpy(array.data.get(), values.begin(), values.size() * sizeof(int32_t));
  return array;
}

// Boxes x1 y1 x2 y2 around an area of `side`, and what one must not rely on: none of these numbers is checked by Python.
static void fill_boxes(Array *boxes, float side) {
  const int64_t columns = boxes->shape.back();
  for (int64_t i = 0; i < boxes->size() / columns; ++i) {
    float *box = boxes->data.get() + i * columns;
    for (int j = 0; j < 4; ++j) box[j] = (box[j] * 1.5f + 0.5f) * side;
    if (i % 3) box[2] = box[0] + std::abs(box[2]), box[3] = box[1] + std::abs(box[3]);
    if (i % 11 == 7) box[i % 4] = i % 2 ? NAN : INFINITY;
    if (i % 13 == 9) box[i % 4] = i % 2 ? 1e30f : -1e30f;
    if (columns > 4) box[4] = static_cast<float>(i % 6 - 1);
  }
}

// A sequence: x = images, a = pointwise(x) in the arena, y = strided(a); then the same with each number of its plan wrong,
// and random ones, which are refused or taken without harm.
static void check_sequences() {
  const int32_t b = 2, c = 5, o = 7, h = 6, w = 9, half_h = 3, half_w = 5;
  Array images({b, c, h, w}), constants({o}), weight({o, c, 1, 1}), kernel({3, o, 3, 3}), bias({3}), y({b * 3 * half_h * half_w});
  std::vector<int32_t> words = {mindska::kPlanMark, 0, o, b * 3 * half_h * half_w, (b * o * h * w + 15) / 16, 2};
  const auto add = [&](std::initializer_list<int32_t> numbers) { words.insert(words.end(), numbers); };
  const auto add_name = [&](const std::string &name) {
    words.push_back(static_cast<int32_t>(name.size()));
    words.insert(words.end(), name.begin(), name.end());
  };
  add_name("mindska_pointwise");
  add({4, 0, 0, 0, 4, b, c, h, w, 5, 0, 0, 4, o, c, 1, 1, 1, 0, 0, 1, o, 3, 0, 0, 4, b, o, h, w});
  add_name("mindska_strided");
  add({5, 3, 0, 0, 4, b, o, h, w, 6, 0, 0, 4, 3, o, 3, 3, 7, 0, 0, 1, 3, 2, 0, 1, 1, 3, 4, 0, 0, 4, b, 3, half_h, half_w});
  const size_t numbers_at = words.size() - 12;  // the offset of the second operator's numbers
  words[numbers_at] = static_cast<int32_t>(words.size());
  add({2, 1, 0});
  words[1] = static_cast<int32_t>(words.size());
  Array plan({words[1]});
  plan.type = "int32";
  std::memcpy(plan.data.get(), words.data(), words.size() * sizeof(int32_t));
  RUN(mindska_sequence, images, constants, plan, weight, kernel, bias, y);
  Array hidden({b, o, h, w}), expected({b, 3, half_h, half_w}), shift({o}), options = integers({2, 1, 0});
  std::memcpy(shift.data.get(), constants.data.get(), o * sizeof(float));
  const auto call_of = [](const char *name, Entry function, std::initializer_list<const Array *> arrays) {
    Call call{name, function, {}, {}, {}};
    for (const Array *array : arrays) {
      call.data.push_back(array->data.get()), call.shapes.push_back(array->shape), call.types.push_back(array->type);
    }
    return call;
  };
  if (call_of("mindska_pointwise", mindska_pointwise, {&images, &weight, &shift, &hidden}).run() ||
      call_of("mindska_strided", mindska_strided, {&hidden, &kernel, &bias, &options, &expected}).run()) {
    fail("the operators of a sequence did not run");
  }
  const Call call =
      call_of("mindska_sequence", mindska_sequence, {&images, &constants, &plan, &weight, &kernel, &bias, &y});
  for (int turn = 0; turn < 2; ++turn) {  // the second time with the plan that was kept
    if (call.run()) fail("a sequence did not run");
    if (std::memcmp(y.data.get(), expected.data.get(), y.bytes())) fail("a sequence computes something else");
  }
  int32_t *numbers = reinterpret_cast<int32_t *>(plan.data.get());
  for (size_t i = 0; i < words.size(); ++i) {
    for (const int64_t wrong : {int64_t{0}, int64_t{-1}, int64_t{1}, words[i] - int64_t{1}, words[i] + int64_t{1},
                                words[i] + int64_t{5}, words[i] * int64_t{2}, int64_t{INT32_MIN}, int64_t{INT32_MAX}}) {
      if (wrong == words[i] || wrong < INT32_MIN || wrong > INT32_MAX) continue;
      numbers[i] = static_cast<int32_t>(wrong);
      const bool ran = call.run() == 0;  // other numbers of operators, and other places in the arena, are harmless
      if (ran && i < 5) fail("a sequence took a plan for other sizes");
      numbers[i] = words[i];
    }
  }
  for (int turn = 0; turn < 20000; ++turn) {
    for (int change = 0; change < 3; ++change) numbers[std::rand() % words.size()] = words[std::rand() % words.size()];
    call.run();
    std::memcpy(numbers, words.data(), words.size() * sizeof(int32_t));
  }
  if (call.run()) fail("a sequence did not run again");
}

// The update of two parameters: one of some size, and one number.
static void check_updates(int64_t size) {
  const auto numbers = [](std::initializer_list<float> values) {
    Array array({static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), array.data.get());
    return array;
  };
  Array finite = integers({1}), factor({1}), power1({1}), power2({1}), step = integers({0}), decays({2}), rates({1});
  Array options = numbers({0.9f, 0.99f, 1e-8f}), momentum({1}), table_of = integers({0, 0}), done({1});
  Array a({size, 1}), b({1, 1, 1}), c(a.shape), d(b.shape), e(a.shape), f(b.shape), g(a.shape), h(b.shape);
  const auto again = [&] { step.data[0] = 0; };  // the bits of an int32 0
  RUN(mindska_multi_tensor_adamw, finite, factor, power1, power2, step, options, decays, table_of, rates, a, b, c, d, e, f, g, h, done);
  again();
  RUN(mindska_multi_tensor_momentum, finite, factor, momentum, step, decays, table_of, rates, a, b, c, d, e, f, done);
  Array counts = integers({1}), decay_rest = numbers({0.9f, 0.1f});
  RUN(mindska_multi_tensor_average, finite, decay_rest, counts, a, c, b, d, done);
  finite = integers({0});
  RUN(mindska_multi_tensor_average, finite, decay_rest, counts, a, c, b, d, done);
}

int main(int argc, char **argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  mindska_set_threads(threads);
  if (threads == 0) {  // two live buffers of one workspace: this ends the program
    const mindska::Workspace first(mindska::Slot::kAccumulator, 1), second(mindska::Slot::kAccumulator, 1);
    return 0;
  }
  for (int64_t size : {1, 15, 16, 17, 16384, 16385}) {
    Array x({size}), dy({size}), y({size});
    Array total({1});
    RUN(mindska_gelu, x, y);
    RUN(mindska_square_sum, x, total, x, total);
    RUN(mindska_gelu_grad, x, dy, y);
    check_updates(size);
    Array dx({size});
    RUN(mindska_silu_mul, x, dy, y);
    RUN(mindska_add_relu, x, dy, y);
    RUN(mindska_silu_mul_grad, x, dy, y, dx, y);
  }
  const int64_t planes[][4] = {{1, 1, 1, 1}, {2, 3, 7, 7}, {1, 2, 1, 70}, {1, 2, 70, 1}, {1, 3, 33, 129}};
  const int64_t kernel_sizes[][3] = {{3, 3, 1}, {7, 7, 3}, {1, 17, 3}, {17, 1, 3}, {5, 5, 2}, {1, 3, 1}};
  for (auto &p : planes) {
    for (auto &k : kernel_sizes) {
      Array x({p[0], p[1], p[2], p[3]}), y(x.shape), dx(x.shape), weight({p[1], 1, k[0], k[1]}), bias({p[1]});
      Array dweight(weight.shape), dbias(bias.shape), dilation = integers({static_cast<int32_t>(k[2])});
      RUN(mindska_depthwise, x, weight, bias, dilation, y);
      RUN(mindska_depthwise_grad, x, weight, dilation, y, dx, dweight, dbias);
      Array maps(x.shape), gamma({p[1]}), dgamma({p[1]}), eps({1});
      Array options({3}), mean({p[1]}), inv_std({p[1]}), running({p[1]}), other({p[1]});
      RUN(mindska_batch_norm, x, gamma, bias, dbias, dgamma, options, y, mean, inv_std, running, other);
      RUN(mindska_batch_norm_grad, x, gamma, mean, inv_std, y, options, maps, dx, dgamma, dbias);
      RUN(mindska_layer_norm, x, gamma, bias, eps, y);
      RUN(mindska_layer_norm_grad, x, gamma, eps, y, dx, dgamma, dbias);
      Array one({1}), drop_path_mask({p[0]});
      RUN(mindska_residual, x, dx, y, gamma, drop_path_mask, maps);
      RUN(mindska_residual, x, one, one, gamma, one, maps);
      RUN(mindska_residual_grad, x, dx, gamma, drop_path_mask, y, maps, dgamma);
      RUN(mindska_residual_grad, x, one, gamma, one, y, maps, dgamma);
      RUN(mindska_depthwise_gelu, x, weight, bias, dilation, y);
      RUN(mindska_depthwise_gelu_with_preactivation, x, weight, bias, dilation, y, maps);
      RUN(mindska_depthwise_gelu_grad, x, weight, dilation, y, maps, dx, dweight, dbias);
    }
  }
  const int64_t products[][6] = {  // batch, channels in and out, height, width, groups
      {1, 1, 1, 1, 1, 1}, {2, 5, 7, 3, 3, 1}, {3, 20, 12, 7, 7, 4}, {1, 90, 100, 1, 97, 1}, {20, 16, 24, 1, 1, 2}};
  for (auto &p : products) {
    Array x({p[0], p[1], p[3], p[4]}), y({p[0], p[2], p[3], p[4]}), dx(x.shape), weight({p[2], p[1] / p[5], 1, 1});
    Array bias({p[2]}), dweight(weight.shape), dbias(bias.shape), other(y.shape);
    Array scale({p[1] / p[5]}), shift(scale.shape), mean(scale.shape), variance(scale.shape), eps({1});
    RUN(mindska_norm_scale_shift, scale, shift, mean, variance, eps, mean, variance);
    RUN(mindska_fold_norm_into_next_conv, weight, bias, scale, shift, dweight, dbias);
    RUN(mindska_pointwise, x, weight, bias, y);
    RUN(mindska_pointwise_grad, x, weight, y, dx, dweight, dbias);
    for (int32_t epilogue = 0; epilogue < 7; ++epilogue) {
      Array number = integers({epilogue});
      RUN(mindska_pointwise_epilogue, x, weight, bias, dbias, other, number, y);
    }
  }
  const int64_t strides[][8] = {  // batch, channels in and out, height, width, kernel, stride, dilation
      {1, 1, 1, 1, 1, 3, 2, 1}, {2, 3, 8, 33, 20, 7, 4, 1}, {3, 8, 12, 9, 8, 3, 2, 2}, {2, 20, 90, 1, 70, 1, 2, 1},
      {70, 6, 6, 3, 2, 3, 4, 1}, {1, 6, 5, 2, 100, 5, 3, 3}};
  for (auto &c : strides) {
    Array x({c[0], c[1], c[3], c[4]}), y({c[0], c[2], (c[3] + c[6] - 1) / c[6], (c[4] + c[6] - 1) / c[6]}), dx(x.shape);
    Array weight({c[2], c[1], c[5], c[5]}), bias({c[2]}), dweight(weight.shape), dbias(bias.shape);
    Array options = integers({static_cast<int32_t>(c[6]), static_cast<int32_t>(c[7]), 1});
    RUN(mindska_strided, x, weight, bias, options, y);
    RUN(mindska_strided_input_grad, x, weight, options, y, dx);
    RUN(mindska_strided_weight_grad, x, weight, options, y, dweight, dbias);
    const int32_t high = static_cast<int32_t>((c[3] + 2) / 2), wide = static_cast<int32_t>((c[4] + 2) / 2);
    Array windows = integers({1, 1, high, wide}), maxima({c[0], c[1], high, wide}), means({c[0], c[1]});
    RUN(mindska_max_pool, x, windows, maxima);
    RUN(mindska_global_max_pool, x, means);
    RUN(mindska_global_avg_pool, x, means);
    const int64_t side = std::min(c[3], c[4]) > 2 ? 2 : 1;
    Array size = integers({static_cast<int32_t>(side)}), pooled({c[0], c[1], c[3] / side, c[4] / side});
    RUN(mindska_avg_pool, x, size, pooled);
    Array logits({c[0], c[2]}), dense_weight({c[2], c[1]});
    RUN(mindska_dense, means, dense_weight, bias, logits);
    Array part({c[0], (c[1] + 1) / 2, c[3], c[4]});
    Array numbers = integers({static_cast<int32_t>(c[1] / 2), static_cast<int32_t>(part.shape[1])});
    RUN(mindska_slice_channels, x, numbers, part);
  }
  const int64_t convolutions[][8] = {  // batch, channels in and out, height, width, groups, kernel, dilation
      {1, 4, 6, 1, 1, 2, 3, 2}, {2, 8, 8, 7, 7, 2, 3, 1}, {1, 15, 9, 5, 30, 3, 5, 2}};
  for (auto &c : convolutions) {
    Array x({c[0], c[1], c[3], c[4]}), y({c[0], c[2], c[3], c[4]}), dx(x.shape), weight({c[2], c[1] / c[5], c[6], c[6]});
    Array bias({c[2]}), dweight(weight.shape), dbias(bias.shape), options = integers({static_cast<int32_t>(c[7]), 1});
    RUN(mindska_grouped, x, weight, bias, options, y);
    RUN(mindska_grouped_grad, x, weight, options, y, dx, dweight, dbias);
    Array second(x.shape), mean({c[0], c[1], 1, 1}), weights({c[0], 2, c[1]}), dsecond(x.shape), dweights(weights.shape);
    RUN(mindska_mean_of_sum, x, second, mean);
    RUN(mindska_weighted_sum, x, second, weights, dx);
    RUN(mindska_softmax, weights, dweights);
    Array strided_options = integers({2, static_cast<int32_t>(c[7]), 1}), half({c[0], c[2], (c[3] + 1) / 2, (c[4] + 1) / 2});
    RUN(mindska_strided, x, weight, bias, strided_options, half);
    RUN(mindska_weighted_sum_grad, x, second, weights, dsecond, dx, second, dweights);
  }
  const int64_t resizes[][6] = {{1, 1, 1, 1, 1, 1}, {2, 3, 7, 9, 14, 18}, {1, 2, 5, 40, 3, 17}, {2, 1, 3, 2, 70, 90}};
  for (auto &c : resizes) {
    Array x({c[0], c[1], c[2], c[3]}), y({c[0], c[1], c[4], c[5]}), rows({c[4]}), columns({c[5]}), dx(x.shape);
    for (int64_t i = 0; i < c[4]; ++i) rows.data[i] = static_cast<float>(i * (c[2] - 1)) / c[4];
    for (int64_t i = 0; i < c[5]; ++i) columns.data[i] = static_cast<float>(i * (c[3] - 1)) / c[5];
    RUN(mindska_resize, x, rows, columns, y);
    RUN(mindska_resize_grad, x, rows, columns, y, dx);
  }
  const int64_t losses[][8] = {  // batch, classes, height, width of the logits, of the labels, and of enlarged logits
      {1, 1, 1, 1, 1, 1, 1, 1}, {2, 21, 9, 7, 33, 26, 36, 28}, {1, 33, 40, 21, 13, 9, 13, 9}, {1, 5, 3, 2, 90, 70, 91, 70}};
  for (auto &c : losses) {
    Array logits({c[0], c[1], c[2], c[3]}), labels({c[0], c[4], c[5]}), loss(labels.shape), dlogits(logits.shape);
    int32_t *label = reinterpret_cast<int32_t *>(labels.data.get());
    for (int64_t i = 0; i < labels.size(); ++i) label[i] = std::rand() % 40 - 2;
    labels.type = "int32";
    Array size = integers({static_cast<int32_t>(c[6] - c[4]), static_cast<int32_t>(c[7] - c[5])}), options = integers({0, 7});
    RUN(mindska_pixel_cross_entropy, logits, labels, size, options, loss);
    RUN(mindska_pixel_cross_entropy_grad, logits, labels, size, options, loss, dlogits);
  }
  const int64_t winograds[][6] = {  // batch, channels in and out, height, width, dilation
      {1, 1, 1, 1, 1, 1}, {2, 5, 7, 9, 11, 1}, {1, 17, 9, 32, 32, 1}, {1, 70, 33, 65, 57, 1}, {1, 5, 49, 3, 150, 1},
      {1, 300, 70, 6, 5, 1}, {2, 9, 10, 9, 20, 2}, {2, 5, 6, 4, 5, 40}};
  for (auto &c : winograds) {
    Array x({c[0], c[1], c[3], c[4]}), y({c[0], c[2], c[3], c[4]}), dx(x.shape), weight({c[2], c[1], 3, 3}), bias({c[2]});
    Array dweight(weight.shape), dbias(bias.shape), options = integers({static_cast<int32_t>(c[5]), 1});
    RUN(mindska_winograd, x, weight, bias, options, y);
    RUN(mindska_winograd_input_grad, weight, options, y, dx);
    RUN(mindska_winograd_weight_grad, x, options, y, dweight, dbias);
  }
  const int64_t scenes[][3] = {{1, 1, 1}, {2, 17, 3}, {1, 1500, 40}, {2, 2049, 1}};  // batch, priors, objects
  for (auto &s : scenes) {
    Array priors({s[0], s[1], 4}), objects({s[0], s[2], 4}), thresholds({3}), threshold({1}), matched({s[0], s[1]});
    fill_boxes(&priors, 90), fill_boxes(&objects, 90);
    thresholds.data[0] = 0.5f, thresholds.data[1] = 0.4f, thresholds.data[2] = 0, threshold.data[0] = 0.5f;
    matched.type = "int32";
    RUN(mindska_assign_max_iou, priors, objects, thresholds, matched);
    RUN(mindska_suppress, priors, threshold, matched);
  }
  const int64_t pyramids[][5] = {{1, 1, 1, 1, 1}, {2, 5, 20, 33, 40}, {1, 70, 33, 9, 13}};  // B, C, H, W of p0, boxes
  for (auto &p : pyramids) {
    for (int32_t out : {1, 7, 14}) {
      const auto level = [&](int64_t k) { return Array({p[0], p[1], (p[2] + k - 1) / k, (p[3] + k - 1) / k}); };
      Array p0 = level(1), p1 = level(2), p2 = level(4), p3 = level(8), d0 = level(1), d1 = level(2), d2 = level(4);
      Array d3 = level(8), rois({p[0], p[4], 5}), y({p[0] * p[4], p[1], out, out}), options = integers({out, 4});
      fill_boxes(&rois, 4.0f * p[3]);
      RUN(mindska_roi_align, p0, p1, p2, p3, rois, options, y);
      RUN(mindska_roi_align_grad, p0, p1, p2, p3, rois, options, y, d0, d1, d2, d3);
      Array masks({p[0], 4, p[2], (p[3] + 7) / 8}), targets({p[0], p[4], out, out}), size = integers({out});
      masks.data.reset(new float[p[0] * p[2] * ((p[3] + 7) / 8)]());  // a byte each
      masks.type = "uint8";
      fill_boxes(&rois, p[3]);
      RUN(mindska_mask_targets, masks, rois, size, targets);
    }
  }
  const int64_t mlps[][5] = {{1, 3, 5, 1, 1}, {2, 5, 70, 7, 9}, {1, 16, 33, 40, 130}, {1, 9, 33, 130, 33}};
  for (auto &m : mlps) {
    Array x({m[0], m[1], m[3], m[4]}), y(x.shape), shortcut(x.shape), weight1({m[2], m[1], 1, 1}), bias1({m[2]});
    Array dw_weight({m[2], 1, 3, 3}), dw_bias({m[2]}), weight2({m[1], m[2], 1, 1}), bias2({m[1]}), scale({m[1]});
    Array dx(x.shape), dweight1(weight1.shape), dbias1(bias1.shape), ddw_weight(dw_weight.shape), ddw_bias(dw_bias.shape);
    Array dweight2(weight2.shape), dbias2(bias2.shape);
    RUN(mindska_fused_mlp, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, y);
    RUN(mindska_fused_mlp_residual, x, weight1, bias1, dw_weight, dw_bias, weight2, bias2, scale, shortcut, y);
    RUN(mindska_fused_mlp_grad, x, weight1, bias1, dw_weight, dw_bias, weight2, y, dx, dweight1, dbias1, ddw_weight,
        ddw_bias, dweight2, dbias2);
  }
  for (int64_t channels : {8, 24}) {
    Array x({2, channels, 5, 7}), y(x.shape), dx(x.shape), options = integers({2, 3, 1});
    Array weight1({channels * 3 / 8, 1, 5, 5}), bias1({channels * 3 / 8}), weight2({channels / 2, 1, 7, 7});
    Array bias2({channels / 2}), dweight1(weight1.shape), dbias1(bias1.shape), dweight2(weight2.shape), dbias2(bias2.shape);
    RUN(mindska_split_depthwise, x, weight1, bias1, weight2, bias2, options, y);
    RUN(mindska_split_depthwise_grad, x, weight1, weight2, options, y, dx, dweight1, dbias1, dweight2, dbias2);
  }
  const int64_t graphs[][8] = {  // batch, channels, height, width, pooled height and width, k, dilation
      {1, 8, 1, 5, 1, 5, 5, 1}, {2, 24, 9, 7, 4, 3, 5, 2}, {1, 16, 8, 8, 8, 8, 4, 3}, {3, 40, 5, 13, 5, 13, 5, 13}};
  for (auto &g : graphs) {
    Array x({g[0], g[1], g[2], g[3]}), y({g[0], g[1], g[4], g[5]}), position({g[4] * g[5], g[2] * g[3]});
    Array options = integers({static_cast<int32_t>(g[6]), static_cast<int32_t>(g[7])});
    Array z({g[0], 2 * g[1], g[2], g[3]}), index({g[0], g[2] * g[3], g[6]}), dx(x.shape), dy(y.shape);
    index.type = "int32";
    RUN(mindska_max_relative, x, y, position, options, z, index);
    RUN(mindska_max_relative_grad, y, index, z, options, dx, dy);
  }
  check_sequences();
  std::puts("clean");
}
