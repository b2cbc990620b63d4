// Batch norm in training, with a ReLU after it or not, and its gradients. A channel of all images fits into the
// second-level cache, so that only the first of the passes over it waits for the memory.
#include "activation.h"

namespace mindska {

// A channel of feature maps (B, C, H, W).
struct Channel {
  int64_t batch, step, pixels;  // step: from one image to the next

  Channel(const int64_t *shape) : batch(shape[0]), step(shape[1] * shape[2] * shape[3]), pixels(shape[2] * shape[3]) {}

  double count() const { return static_cast<double>(batch * pixels); }

  // function(first, count) over the vectors of all images.
  template <typename Function>
  void for_each(Function function) const {
    for (int64_t image = 0; image < batch; ++image) {
      for_each_vector(pixels, [&](int64_t i, int n) { function(image * step + i, n); });
    }
  }

  // The sum over all pixels of value(first, count), whose vectors are zero beyond `count`.
  template <typename Value>
  double total(Value value) const {
    double result = 0;
    for (int64_t image = 0; image < batch; ++image) {
      Vec sums = {};
      for_each_vector(pixels, [&](int64_t i, int n) { sums += value(image * step + i, n); });
      result += sum(sums);
    }
    return result;
  }
};

}  // namespace mindska

// mean, variance: the running ones. options: epsilon, momentum (the share that the running values keep), 1 for a ReLU.
// inv_std: 1 / sqrt(variance + epsilon); it and batch_mean are those of the batch.
MINDSKA_OPERATOR(mindska_batch_norm,
                 "x (B, C, H, W), gamma (C), beta (C), mean (C), variance (C), options (3) "
                 "-> y (B, C, H, W), batch_mean (C), inv_std (C), new_mean (C), new_variance (C)") {
  using namespace mindska;
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const auto output = [&](int i) { return static_cast<float *>(params[6 + i]); };
  const float eps = input(5)[0], momentum = input(5)[1];
  const bool with_relu = input(5)[2] > 0;
  const Channel channel(shapes[0]);
  parallel_for(shapes[0][1], element_count(shapes[0], 4), [&](int64_t c) {
    const float *x = input(0) + c * channel.pixels;
    float *y = output(0) + c * channel.pixels;
    const float mean =
        static_cast<float>(channel.total([=](int64_t i, int n) { return load_some(x + i, n); }) / channel.count());
    const double squares = channel.total([=](int64_t i, int n) {
      Vec deviation = load_some(x + i, n) - mean;
      for (int lane = n; lane < kLanes; ++lane) deviation[lane] = 0;
      return deviation * deviation;
    });
    const float variance = static_cast<float>(squares / channel.count());
    const float inv_std = static_cast<float>(1 / std::sqrt(static_cast<double>(variance) + eps));
    const float gamma = input(1)[c], beta = input(2)[c];
    channel.for_each([=](int64_t i, int n) {
      Vec v = (load_some(x + i, n) - mean) * inv_std * gamma + beta;
      if (with_relu) v = relu(v);
      store_some(y + i, v, n);
    });
    output(1)[c] = mean;
    output(2)[c] = inv_std;
    output(3)[c] = momentum * input(3)[c] + (1 - momentum) * mean;
    const double unbiased = squares / std::max(channel.count() - 1, 1.0);
    output(4)[c] = momentum * input(4)[c] + (1 - momentum) * static_cast<float>(unbiased);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_batch_norm_grad,
                 "x (B, C, H, W), gamma (C), batch_mean (C), inv_std (C), y (B, C, H, W), options (3), dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dgamma (C), dbeta (C)") {
  using namespace mindska;
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const auto output = [&](int i) { return static_cast<float *>(params[7 + i]); };
  const bool with_relu = input(5)[2] > 0;
  const Channel channel(shapes[0]);
  parallel_for(shapes[0][1], element_count(shapes[0], 4), [&](int64_t c) {
    const float *x = input(0) + c * channel.pixels, *y = input(4) + c * channel.pixels;
    const float *dy = input(6) + c * channel.pixels;
    float *dx = output(0) + c * channel.pixels;
    const float gamma = input(1)[c], mean = input(2)[c], inv_std = input(3)[c];
    const auto grad = [=](int64_t i, int n) {
      const Vec d = load_some(dy + i, n);
      return with_relu ? (load_some(y + i, n) > Vec{} ? d : Vec{}) : d;
    };
    const double dbeta = channel.total(grad);
    const double dgamma =
        channel.total([=](int64_t i, int n) { return grad(i, n) * ((load_some(x + i, n) - mean) * inv_std); });
    const float mean_dbeta = static_cast<float>(dbeta / channel.count());
    const float mean_dgamma = static_cast<float>(dgamma / channel.count());
    channel.for_each([=](int64_t i, int n) {
      const Vec normalized = (load_some(x + i, n) - mean) * inv_std;
      store_some(dx + i, (grad(i, n) - mean_dbeta - normalized * mean_dgamma) * (gamma * inv_std), n);
    });
    output(1)[c] = static_cast<float>(dgamma);
    output(2)[c] = static_cast<float>(dbeta);
  });
  return 0;
}
