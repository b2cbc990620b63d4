// Of two feature maps: the mean over the pixels of their sum, and their weighted sum (SKNet's "fuse" and "select"); the
// weights' softmax, and parts of the channels of a map.
#include "simd.h"

namespace mindska {

// function(plane) for B * C planes, by all threads.
template <typename Function>
static void parallel_for_each_plane(const int64_t *shape, Function function) {
  parallel_for(shape[0] * shape[1], element_count(shape, 4), [&](int64_t plane) { function(plane); });
}

static inline float dot(const float *a, const float *b, int64_t count) {
  Vec total = {};
  for_each_vector(count, [&](int64_t i, int n) { total += load_some(a + i, n) * load_some(b + i, n); });
  return sum(total);
}

}  // namespace mindska

MINDSKA_OPERATOR(mindska_mean_of_sum, "first (B, C, H, W), second (B, C, H, W) -> mean (B, C, 1, 1)") {
  using namespace mindska;
  const float *first = static_cast<float *>(params[0]), *second = static_cast<float *>(params[1]);
  float *mean = static_cast<float *>(params[2]);
  const int64_t pixels = shapes[0][2] * shapes[0][3];
  parallel_for_each_plane(shapes[0], [=](int64_t plane) {
    const int64_t at = plane * pixels;
    mean[plane] = (sum_of(first + at, pixels) + sum_of(second + at, pixels)) / static_cast<float>(pixels);
  });
  return 0;
}

// y = weights[:, 0] * first + weights[:, 1] * second
MINDSKA_OPERATOR(mindska_weighted_sum, "first (B, C, H, W), second (B, C, H, W), weights (B, 2, C) -> y (B, C, H, W)") {
  using namespace mindska;
  const float *first = static_cast<float *>(params[0]), *second = static_cast<float *>(params[1]);
  const float *weights = static_cast<float *>(params[2]);
  float *y = static_cast<float *>(params[3]);
  const int64_t channels = shapes[0][1], pixels = shapes[0][2] * shapes[0][3];
  parallel_for_each_plane(shapes[0], [=](int64_t plane) {
    const float *weight = weights + plane / channels * 2 * channels + plane % channels;
    const float a = weight[0], b = weight[channels];
    const int64_t at = plane * pixels;
    for_each_vector(pixels, [&](int64_t i, int n) {
      store_some(y + at + i, load_some(first + at + i, n) * a + load_some(second + at + i, n) * b, n);
    });
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_weighted_sum_grad,
                 "first (B, C, H, W), second (B, C, H, W), weights (B, 2, C), dy (B, C, H, W) "
                 "-> dfirst (B, C, H, W), dsecond (B, C, H, W), dweights (B, 2, C)") {
  using namespace mindska;
  const float *first = static_cast<float *>(params[0]), *second = static_cast<float *>(params[1]);
  const float *weights = static_cast<float *>(params[2]), *dy = static_cast<float *>(params[3]);
  float *dfirst = static_cast<float *>(params[4]), *dsecond = static_cast<float *>(params[5]);
  float *dweights = static_cast<float *>(params[6]);
  const int64_t channels = shapes[0][1], pixels = shapes[0][2] * shapes[0][3];
  parallel_for_each_plane(shapes[0], [=](int64_t plane) {
    const int64_t weight = plane / channels * 2 * channels + plane % channels, at = plane * pixels;
    const float a = weights[weight], b = weights[weight + channels];
    for_each_vector(pixels, [&](int64_t i, int n) {
      const Vec grad = load_some(dy + at + i, n);
      store_some(dfirst + at + i, grad * a, n);
      store_some(dsecond + at + i, grad * b, n);
    });
    dweights[weight] = dot(dy + at, first + at, pixels);
    dweights[weight + channels] = dot(dy + at, second + at, pixels);
  });
  return 0;
}

// Over the second axis.
MINDSKA_OPERATOR(mindska_softmax, "x (B, P, C) -> y (B, P, C)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  const int64_t parts = shapes[0][1], channels = shapes[0][2];
  for (int64_t i = 0; i < shapes[0][0] * channels; ++i) {
    const int64_t at = i / channels * parts * channels + i % channels;
    float largest = x[at], total = 0;
    for (int64_t p = 1; p < parts; ++p) largest = std::max(largest, x[at + p * channels]);
    for (int64_t p = 0; p < parts; ++p) total += y[at + p * channels] = std::exp(x[at + p * channels] - largest);
    for (int64_t p = 0; p < parts; ++p) y[at + p * channels] /= total;
  }
  return 0;
}

// `count` channels from `first` on.
MINDSKA_OPERATOR(mindska_slice_channels,
                 "x (B, C, H, W), options {first, count} -> y (B, count, H, W) "
                 "where first >= 0, count >= 1, first + count <= C") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  const int32_t *options = static_cast<int32_t *>(params[1]);
  float *y = static_cast<float *>(params[2]);
  const int64_t channels = shapes[0][1], pixels = shapes[0][2] * shapes[0][3], size = options[1] * pixels;
  parallel_for(shapes[0][0], shapes[0][0] * size, [&](int64_t image) {
    std::memcpy(y + image * size, x + (image * channels + options[0]) * pixels, size * sizeof(float));
  });
  return 0;
}
