// Layer norm over the channels of (B, C, H, W) and its gradients, without transposing. Sums over the channels are taken
// for a block of pixels at once; those of deviations from the mean, not of squares, which would cancel.
#include "simd.h"

namespace mindska {

constexpr int kBlockPixels = 4 * kLanes;  // of a task

// kBlockPixels pixels of an image (fewer at its end), all channels.
struct PixelBlock {
  int64_t channels, plane;
  int count;

  void read(const float *from, int64_t channel, Vec (&v)[4]) const {
    for (int i = 0; i < 4; ++i) v[i] = load_some(from + channel * plane + i * kLanes, lanes(i));
  }

  void write(float *to, int64_t channel, const Vec (&v)[4]) const {
    for (int i = 0; i < 4; ++i) store_some(to + channel * plane + i * kLanes, v[i], lanes(i));
  }

  int lanes(int i) const { return std::min(std::max(count - i * kLanes, 0), kLanes); }

  // For each pixel the mean over the channels, and 1 / sqrt(variance + eps).
  void moments(const float *x, float eps, Vec (&mean)[4], Vec (&inv_std)[4]) const {
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
      for (int lane = 0; lane < kLanes; ++lane) inv_std[i][lane] = 1 / std::sqrt(variance[lane]);
    }
  }
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_layer_norm, "x (B, C, H, W), gamma (C), beta (C), eps (1) -> y (B, C, H, W)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *gamma = static_cast<float *>(params[1]);
  const float *beta = static_cast<float *>(params[2]), eps = *static_cast<float *>(params[3]);
  float *y = static_cast<float *>(params[4]);
  const int64_t channels = shapes[0][1], plane = shapes[0][2] * shapes[0][3];
  const int64_t blocks = (plane + kBlockPixels - 1) / kBlockPixels;
  parallel_for(shapes[0][0] * blocks, element_count(shapes[0], 4), [&](int64_t task) {
    const int64_t first = task % blocks * kBlockPixels, at = task / blocks * channels * plane + first;
    const PixelBlock block{channels, plane, static_cast<int>(std::min<int64_t>(kBlockPixels, plane - first))};
    Vec mean[4], inv_std[4], v[4];
    block.moments(x + at, eps, mean, inv_std);
    for (int64_t c = 0; c < channels; ++c) {
      block.read(x + at, c, v);
      for (int i = 0; i < 4; ++i) v[i] = (v[i] - mean[i]) * inv_std[i] * gamma[c] + beta[c];
      block.write(y + at, c, v);
    }
  });
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
  parallel_for(batch, element_count(shapes[0], 4), [&](int64_t image) {
    std::vector<Vec> partial(channels * 2);
    for (int64_t first = 0; first < plane; first += kBlockPixels) {
      const int64_t at = image * channels * plane + first;
      const PixelBlock block{channels, plane, static_cast<int>(std::min<int64_t>(kBlockPixels, plane - first))};
      Vec mean[4], inv_std[4], v[4], d[4], total[4] = {}, product[4] = {};
      block.moments(x + at, eps, mean, inv_std);
      for (int64_t c = 0; c < channels; ++c) {
        block.read(x + at, c, v);
        block.read(dy + at, c, d);
        for (int i = 0; i < 4; ++i) {
          const Vec normalized = (v[i] - mean[i]) * inv_std[i];
          partial[2 * c] += d[i] * normalized;
          partial[2 * c + 1] += d[i];
          total[i] += d[i] * gamma[c];
          product[i] += d[i] * gamma[c] * normalized;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        block.read(x + at, c, v);
        block.read(dy + at, c, d);
        for (int i = 0; i < 4; ++i) {
          const Vec normalized = (v[i] - mean[i]) * inv_std[i];
          v[i] = (d[i] * gamma[c] - (total[i] + normalized * product[i]) / static_cast<float>(channels)) * inv_std[i];
        }
        block.write(dx + at, c, v);
      }
    }
    for (int64_t i = 0; i < channels * 2; ++i) sums[image * channels * 2 + i] = sum(partial[i]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    dgamma[c] = dbeta[c] = 0;
    for (int64_t image = 0; image < batch; ++image) {
      dgamma[c] += sums[(image * channels + c) * 2];
      dbeta[c] += sums[(image * channels + c) * 2 + 1];
    }
  }
  return 0;
}
