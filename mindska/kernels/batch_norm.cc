// Batch norm in training, with a ReLU behind it or not, and its gradients. A channel of all images fits into the
// second-level cache, so that only the first of the passes over it waits for the memory.
#include "simd.h"

namespace mindska {

// A channel of maps (B, C, H, W).
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
// inverse: one over the standard deviation.
MINDSKA_OPERATOR(mindska_batch_norm,
                 "x (B, C, H, W), gamma (C), beta (C), mean (C), variance (C), options (3) "
                 "-> y (B, C, H, W), batch_mean (C), inverse (C), new_mean (C), new_variance (C)") {
  using namespace mindska;
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const auto output = [&](int i) { return static_cast<float *>(params[6 + i]); };
  const float eps = input(5)[0], momentum = input(5)[1];
  const bool relu = input(5)[2] > 0;
  const Channel channel(shapes[0]);
#pragma omp parallel for schedule(static) if (size_of(shapes[0], 4) > kAlone)
  for (int64_t c = 0; c < shapes[0][1]; ++c) {
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
    const float inverse = static_cast<float>(1 / std::sqrt(static_cast<double>(variance) + eps));
    const float gamma = input(1)[c], beta = input(2)[c];
    channel.for_each([=](int64_t i, int n) {
      Vec v = (load_some(x + i, n) - mean) * inverse * gamma + beta;
      if (relu) v = v < Vec{} ? Vec{} : v;  // NaN stays NaN
      store_some(y + i, v, n);
    });
    output(1)[c] = mean;
    output(2)[c] = inverse;
    output(3)[c] = momentum * input(3)[c] + (1 - momentum) * mean;
    const double unbiased = squares / std::max(channel.count() - 1, 1.0);
    output(4)[c] = momentum * input(4)[c] + (1 - momentum) * static_cast<float>(unbiased);
  }
  return 0;
}

MINDSKA_OPERATOR(mindska_batch_norm_grad,
                 "x (B, C, H, W), gamma (C), batch_mean (C), inverse (C), y (B, C, H, W), options (3), dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dgamma (C), dbeta (C)") {
  using namespace mindska;
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const auto output = [&](int i) { return static_cast<float *>(params[7 + i]); };
  const bool relu = input(5)[2] > 0;
  const Channel channel(shapes[0]);
#pragma omp parallel for schedule(static) if (size_of(shapes[0], 4) > kAlone)
  for (int64_t c = 0; c < shapes[0][1]; ++c) {
    const float *x = input(0) + c * channel.pixels, *y = input(4) + c * channel.pixels;
    const float *dy = input(6) + c * channel.pixels;
    float *dx = output(0) + c * channel.pixels;
    const float gamma = input(1)[c], mean = input(2)[c], inverse = input(3)[c];
    const auto slope = [=](int64_t i, int n) {
      const Vec d = load_some(dy + i, n);
      return relu ? (load_some(y + i, n) > Vec{} ? d : Vec{}) : d;
    };
    const double shift = channel.total(slope);
    const double scale =
        channel.total([=](int64_t i, int n) { return slope(i, n) * ((load_some(x + i, n) - mean) * inverse); });
    const float mean_shift = static_cast<float>(shift / channel.count());
    const float mean_scale = static_cast<float>(scale / channel.count());
    channel.for_each([=](int64_t i, int n) {
      const Vec normal = (load_some(x + i, n) - mean) * inverse;
      store_some(dx + i, (slope(i, n) - mean_shift - normal * mean_scale) * (gamma * inverse), n);
    });
    output(1)[c] = static_cast<float>(scale);
    output(2)[c] = static_cast<float>(shift);
  }
  return 0;
}
