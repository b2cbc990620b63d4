// The update of a training step for all parameters at once ("fused", "multi-tensor"): AdamW, SGD with momentum, and the
// average of the weights. They write parameters and state in place, and nothing of them where `finite` is 0.
#include "simd.h"

namespace mindska {

constexpr int64_t kGrain = 1 << 14;  // floats of a task

// Lists of equally many tensors: the i-th of each has one shape.
class TensorLists {
 public:
  TensorLists(int first, int count, int lists, void **params, const int *ranks, int64_t **shapes)
      : data_(params + first), count_(count) {
    for (int i = 0; i < count; ++i) {
      const int64_t *shape = shapes[first + i];
      const int rank = ranks[first + i];
      for (int j = first + i; j < first + lists * count; j += count) {
        if (ranks[j] == rank && std::equal(shape, shape + rank, shapes[j])) continue;
        throw Refused("tensors " + std::to_string(first + i) + " and " + std::to_string(j) + " differ in shape");
      }
      const int64_t size = element_count(shape, rank);
      total_ += size;
      for (int64_t at = 0; at < size; at += kGrain) parts_.push_back({i, at, std::min(kGrain, size - at)});
    }
  }

  // function(tensor, first, size) for parts of all tensors, by all threads.
  template <typename Function>
  void for_each_part(const Function &function) const {
    parallel_for(parts_.size(), total_, [&](int64_t i) { function(parts_[i].tensor, parts_[i].first, parts_[i].size); });
  }

  float *data(int list, int tensor) const { return static_cast<float *>(data_[list * count_ + tensor]); }

 private:
  struct Part {
    int tensor;
    int64_t first, size;
  };

  void **data_;
  const int count_;
  int64_t total_ = 0;
  std::vector<Part> parts_;
};

// What the signature leaves open: tensors that stand for one number, here the inputs before `end`.
static void check_numbers(int end, const int *ranks, int64_t **shapes) {
  for (int i = 0; i < end; ++i) {
    if (element_count(shapes[i], ranks[i]) != 1) throw Refused("tensor " + std::to_string(i) + " is not one number");
  }
}

// The learning rate of each parameter at an update, from tables of them.
static std::vector<float> learning_rates(int first, int tables, const int32_t *table_of, int count, int32_t update,
                                         void **params, const int *ranks, int64_t **shapes) {
  std::vector<float> rates;
  for (int i = 0; i < count; ++i) {
    if (table_of[i] < 0 || table_of[i] >= tables) throw Refused("there is no such table of learning rates", kWrongValue);
    const int table = first + table_of[i];
    if (update < 0 || update >= element_count(shapes[table], ranks[table])) {
      throw Refused("there is no learning rate for update " + std::to_string(update), kWrongValue);
    }
    rates.push_back(static_cast<float *>(params[table])[update]);
  }
  return rates;
}

static int tables_of(int tensors, int fixed, int lists, int count) {
  const int tables = tensors - fixed - lists * count;
  if (tables < 1) throw Refused("there are too few tensors");
  return tables;
}

}  // namespace mindska

// Loshchilov & Hutter, 2019, as PyTorch computes it. `betas_eps`: beta1, beta2, epsilon. `decays`: of each parameter.
// `tensors`: tables of learning rates; then gradients, parameters, first and second moments, N each. Gradients are
// multiplied with `factor`. Written: beta1_power, beta2_power, global_step, parameters and moments. `updated` is `finite`.
MINDSKA_OPERATOR(mindska_multi_tensor_adamw,
                 "finite (*) int32, factor (*), beta1_power (*), beta2_power (*), global_step (*) int32, betas_eps (3), "
                 "decays (N), table_of (N) int32, tensors+ (*) -> updated (1)") {
  using namespace mindska;
  constexpr int kFixed = 8, kLists = 4;
  check_numbers(5, ndims, shapes);
  const bool finite = *static_cast<int32_t *>(params[0]);
  const float factor = *static_cast<float *>(params[1]);
  float *beta1_power = static_cast<float *>(params[2]), *beta2_power = static_cast<float *>(params[3]);
  int32_t *global_step = static_cast<int32_t *>(params[4]);
  const float *options = static_cast<float *>(params[5]), *decays = static_cast<float *>(params[6]);
  const float beta1 = options[0], beta2 = options[1], eps = options[2];
  const int count = static_cast<int>(std::min<int64_t>(shapes[6][0], nparam));
  const int tables = tables_of(nparam - 1, kFixed, kLists, count);
  const TensorLists lists(kFixed + tables, count, kLists, params, ndims, shapes);
  *static_cast<float *>(params[nparam - 1]) = finite;
  if (!finite) return 0;
  const std::vector<float> rates = learning_rates(kFixed, tables, static_cast<int32_t *>(params[7]), count,
                                                  *global_step, params, ndims, shapes);
  *beta1_power *= beta1;
  *beta2_power *= beta2;
  *global_step += 1;
  const float correction = 1 / (1 - *beta1_power), inv_root = 1 / std::sqrt(1 - *beta2_power);
  lists.for_each_part([&](int tensor, int64_t first, int64_t size) {
    const float *gradient = lists.data(0, tensor) + first;
    float *__restrict parameter = lists.data(1, tensor) + first;
    float *__restrict m = lists.data(2, tensor) + first;
    float *__restrict v = lists.data(3, tensor) + first;
    const float rate = rates[tensor] * correction, decay = rates[tensor] * decays[tensor];
    for (int64_t i = 0; i < size; ++i) {
      const float g = gradient[i] * factor;
      m[i] = beta1 * m[i] + (1 - beta1) * g;
      v[i] = beta2 * v[i] + (1 - beta2) * (g * g);
      parameter[i] -= rate * (m[i] / (std::sqrt(v[i]) * inv_root + eps)) + decay * parameter[i];
    }
  });
  return 0;
}

// SGD with momentum, as PyTorch computes it. `tensors`: tables of learning rates; then gradients, parameters and momentum
// buffers, N each. Written: global_step, parameters and buffers. The rest as above.
MINDSKA_OPERATOR(mindska_multi_tensor_momentum,
                 "finite (*) int32, factor (*), momentum (*), global_step (*) int32, decays (N), table_of (N) int32, "
                 "tensors+ (*) -> updated (1)") {
  using namespace mindska;
  constexpr int kFixed = 6, kLists = 3;
  check_numbers(4, ndims, shapes);
  const bool finite = *static_cast<int32_t *>(params[0]);
  const float factor = *static_cast<float *>(params[1]), momentum = *static_cast<float *>(params[2]);
  int32_t *global_step = static_cast<int32_t *>(params[3]);
  const float *decays = static_cast<float *>(params[4]);
  const int count = static_cast<int>(std::min<int64_t>(shapes[4][0], nparam));
  const int tables = tables_of(nparam - 1, kFixed, kLists, count);
  const TensorLists lists(kFixed + tables, count, kLists, params, ndims, shapes);
  *static_cast<float *>(params[nparam - 1]) = finite;
  if (!finite) return 0;
  const std::vector<float> rates = learning_rates(kFixed, tables, static_cast<int32_t *>(params[5]), count,
                                                  *global_step, params, ndims, shapes);
  *global_step += 1;
  lists.for_each_part([&](int tensor, int64_t first, int64_t size) {
    const float *gradient = lists.data(0, tensor) + first;
    float *__restrict parameter = lists.data(1, tensor) + first;
    float *__restrict buffer = lists.data(2, tensor) + first;
    const float rate = rates[tensor], decay = decays[tensor];
    for (int64_t i = 0; i < size; ++i) {
      buffer[i] = momentum * buffer[i] + (gradient[i] * factor + decay * parameter[i]);
      parameter[i] -= rate * buffer[i];
    }
  });
  return 0;
}

// What follows an update: average = decay * average + rest * value, and last_good = statistic. After none (`finite` is 0)
// statistic = last_good. `tensors`: averages and values, `averages` each; then last_good and statistics. Written: averages,
// and last_good or statistics.
MINDSKA_OPERATOR(mindska_multi_tensor_average,
                 "finite (*) int32, decay_rest (2), options {averages}, tensors+ (*) -> updated (1) where averages >= 0") {
  using namespace mindska;
  constexpr int kFixed = 3;
  check_numbers(1, ndims, shapes);
  const bool finite = *static_cast<int32_t *>(params[0]);
  const float decay = static_cast<float *>(params[1])[0], rest = static_cast<float *>(params[1])[1];
  const int64_t averages = *static_cast<int32_t *>(params[2]), others = nparam - 1 - kFixed - 2 * averages;
  if (others < 0 || others % 2) throw Refused("there are too few tensors");
  const int count = static_cast<int>(averages), statistics = static_cast<int>(others / 2);
  const TensorLists averaged(kFixed, count, 2, params, ndims, shapes);
  const TensorLists kept(kFixed + 2 * count, statistics, 2, params, ndims, shapes);
  *static_cast<float *>(params[nparam - 1]) = finite;
  if (finite) {
    averaged.for_each_part([&](int tensor, int64_t first, int64_t size) {
      float *__restrict average = averaged.data(0, tensor) + first;
      const float *value = averaged.data(1, tensor) + first;
      for (int64_t i = 0; i < size; ++i) average[i] = average[i] * decay + value[i] * rest;
    });
  }
  kept.for_each_part([&](int tensor, int64_t first, int64_t size) {
    const float *from = kept.data(finite ? 1 : 0, tensor) + first;
    std::memcpy(kept.data(finite ? 0 : 1, tensor) + first, from, size * sizeof(float));
  });
  return 0;
}
