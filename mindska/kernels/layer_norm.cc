// Layer norm over the channels of (B, C, H, W) and its gradients, without transposing. Sums over the channels are taken
// for a block of pixels at once; those of deviations from the mean, not of squares, which would cancel.
#include "simd.h"

namespace mindska {

constexpr int kPixels = 4 * kLanes;

// kPixels pixels (fewer at the end) of an image, all channels.
struct Pixels {
  int64_t channels, plane;
  int count;

  void read(const float *from, int64_t channel, Vec (&v)[4]) const {
    for (int i = 0; i < 4; ++i) v[i] = load_some(from + channel * plane + i * kLanes, lanes(i));
  }

  void write(float *to, int64_t channel, const Vec (&v)[4]) const {
    for (int i = 0; i < 4; ++i) store_some(to + channel * plane + i * kLanes, v[i], lanes(i));
  }

  int lanes(int i) const { return std::min(std::max(count - i * kLanes, 0), kLanes); }

  // Means over the channels, and one over the standard deviations.
  void moments(const float *x, float eps, Vec (&mean)[4], Vec (&inverse)[4]) const {
    Vec v[4], total[4] = {}, squares[4] = {};
    for (int64_t c = 0; c < channels; ++c) {
      read(x, c, v);
      for (int i = 0; i < 4; ++i) total[i] += v[i];
    }
    for (int i = 0; i < 4; ++i) mean[i] = total[i] / static_cast<float>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      read(x, c, v);
      for (int i = 0; i < 4; ++i) squares[i] += (v[i] - mean[i]) * (v[i] - mean[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const Vec variance = squares[i] / static_cast<float>(channels) + eps;
      for (int lane = 0; lane < kLanes; ++lane) inverse[i][lane] = 1 / std::sqrt(variance[lane]);
    }
  }
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_layer_norm, "x (B, C, H, W), gamma (C), beta (C), eps (1) -> y (B, C, H, W)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *gamma = static_cast<float *>(params[1]);
  const float *beta = static_cast<float *>(params[2]), eps = *static_cast<float *>(params[3]);
  float *y = static_cast<float *>(params[4]);
  const int64_t channels = shapes[0][1], plane = shapes[0][2] * shapes[0][3], blocks = (plane + kPixels - 1) / kPixels;
#pragma omp parallel for schedule(static) if (size_of(shapes[0], 4) > kAlone)
  for (int64_t task = 0; task < shapes[0][0] * blocks; ++task) {
    const int64_t first = task % blocks * kPixels, at = task / blocks * channels * plane + first;
    const Pixels pixels{channels, plane, static_cast<int>(std::min<int64_t>(kPixels, plane - first))};
    Vec mean[4], inverse[4], v[4];
    pixels.moments(x + at, eps, mean, inverse);
    for (int64_t c = 0; c < channels; ++c) {
      pixels.read(x + at, c, v);
      for (int i = 0; i < 4; ++i) v[i] = (v[i] - mean[i]) * inverse[i] * gamma[c] + beta[c];
      pixels.write(y + at, c, v);
    }
  }
  return 0;
}

MINDSKA_OPERATOR(mindska_layer_norm_grad,
                 "x (B, C, H, W), gamma (C), eps (1), dy (B, C, H, W) -> dx (B, C, H, W), dgamma (C), dbeta (C)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *gamma = static_cast<float *>(params[1]);
  const float eps = *static_cast<float *>(params[2]), *dy = static_cast<float *>(params[3]);
  float *dx = static_cast<float *>(params[4]), *dgamma = static_cast<float *>(params[5]);
  float *dbeta = static_cast<float *>(params[6]);
  const int64_t batch = shapes[0][0], channels = shapes[0][1], plane = shapes[0][2] * shapes[0][3];
  std::vector<float> sums(batch * channels * 2);  // of each image: for gamma, and for beta
#pragma omp parallel for schedule(static) if (size_of(shapes[0], 4) > kAlone)
  for (int64_t image = 0; image < batch; ++image) {
    std::vector<Vec> own(channels * 2);
    for (int64_t first = 0; first < plane; first += kPixels) {
      const int64_t at = image * channels * plane + first;
      const Pixels pixels{channels, plane, static_cast<int>(std::min<int64_t>(kPixels, plane - first))};
      Vec mean[4], inverse[4], v[4], d[4], total[4] = {}, product[4] = {};
      pixels.moments(x + at, eps, mean, inverse);
      for (int64_t c = 0; c < channels; ++c) {
        pixels.read(x + at, c, v);
        pixels.read(dy + at, c, d);
        for (int i = 0; i < 4; ++i) {
          const Vec normal = (v[i] - mean[i]) * inverse[i];
          own[2 * c] += d[i] * normal;
          own[2 * c + 1] += d[i];
          total[i] += d[i] * gamma[c];
          product[i] += d[i] * gamma[c] * normal;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        pixels.read(x + at, c, v);
        pixels.read(dy + at, c, d);
        for (int i = 0; i < 4; ++i) {
          const Vec normal = (v[i] - mean[i]) * inverse[i];
          v[i] = (d[i] * gamma[c] - (total[i] + normal * product[i]) / static_cast<float>(channels)) * inverse[i];
        }
        pixels.write(dx + at, c, v);
      }
    }
    for (int64_t i = 0; i < channels * 2; ++i) sums[image * channels * 2 + i] = sum(own[i]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    dgamma[c] = dbeta[c] = 0;
    for (int64_t image = 0; image < batch; ++image) {
      dgamma[c] += sums[(image * channels + c) * 2];
      dbeta[c] += sums[(image * channels + c) * 2 + 1];
    }
  }
  return 0;
}
