// A residual branch: layer scale for each channel, stochastic depth for each sample, and the shortcut; and a sum with ReLU.
#include "activation.h"

namespace mindska {

// A branch is `first`, or `first` + `second`; a tensor of one number stands for one that is absent. The drop-path mask is
// what a sample's branch is multiplied with: one number, or one for each sample.
struct Branch {
  const float *first, *second, *scale, *mask;
  int64_t planes, channels, size;
  bool has_one_mask;

  Branch(void **params, int64_t **shapes, int *ndims, int scale_at)
      : first(static_cast<float *>(params[0])),
        second(ndims[1] == 4 ? static_cast<float *>(params[1]) : nullptr),
        scale(static_cast<float *>(params[scale_at])),
        mask(static_cast<float *>(params[scale_at + 1])),
        planes(shapes[0][0] * shapes[0][1]),
        channels(shapes[0][1]),
        size(shapes[0][2] * shapes[0][3]),
        has_one_mask(shapes[scale_at + 1][0] == 1) {}

  Vec at(int64_t i, int count) const {
    const Vec v = load_some(first + i, count);
    return second ? v + load_some(second + i, count) : v;
  }
  float scale_of(int64_t plane) const { return scale[plane % channels]; }
  float mask_of(int64_t plane) const { return mask[has_one_mask ? 0 : plane / channels]; }
};

}  // namespace mindska

// y = shortcut + drop_path_mask * (scale * (first + second)); a tensor of one number stands for a second or a shortcut
// that is absent.
MINDSKA_OPERATOR(mindska_residual,
                 "first (B, C, H, W), second (B, C, H, W) or (1), shortcut (B, C, H, W) or (1), scale (C), "
                 "drop_path_mask (B) or (1) -> y (B, C, H, W)") {
  using namespace mindska;
  const Branch branch(params, shapes, ndims, 3);
  const float *shortcut = ndims[2] == 4 ? static_cast<float *>(params[2]) : nullptr;
  float *y = static_cast<float *>(params[5]);
  parallel_for(branch.planes, branch.planes * branch.size, [&](int64_t plane) {
    const float scale = branch.scale_of(plane), mask = branch.mask_of(plane);
    for_each_vector(branch.size, [&](int64_t pixel, int count) {
      const int64_t i = plane * branch.size + pixel;
      const Vec v = branch.at(i, count) * scale * mask;
      store_some(y + i, shortcut ? load_some(shortcut + i, count) + v : v, count);
    });
  });
  return 0;
}

// dbranch: the gradient of `first`, and of `second`.
MINDSKA_OPERATOR(mindska_residual_grad,
                 "first (B, C, H, W), second (B, C, H, W) or (1), scale (C), drop_path_mask (B) or (1), dy (B, C, H, W) "
                 "-> dbranch (B, C, H, W), dscale (C)") {
  using namespace mindska;
  const Branch branch(params, shapes, ndims, 2);
  const float *dy = static_cast<float *>(params[4]);
  float *dbranch = static_cast<float *>(params[5]), *dscale = static_cast<float *>(params[6]);
  std::vector<float> sums(branch.planes);
  parallel_for(branch.planes, branch.planes * branch.size, [&](int64_t plane) {
    const float scale = branch.scale_of(plane), mask = branch.mask_of(plane);
    Vec total = {};
    for_each_vector(branch.size, [&](int64_t pixel, int count) {
      const int64_t i = plane * branch.size + pixel;
      const Vec d = load_some(dy + i, count) * mask;
      total += d * branch.at(i, count);
      store_some(dbranch + i, d * scale, count);
    });
    sums[plane] = sum(total);
  });
  for (int64_t c = 0; c < branch.channels; ++c) {
    dscale[c] = 0;
    for (int64_t plane = c; plane < branch.planes; plane += branch.channels) dscale[c] += sums[plane];
  }
  return 0;
}

// For inference.
MINDSKA_OPERATOR(mindska_add_relu, "first (...), second (...) -> y (...)") {
  using namespace mindska;
  const float *first = static_cast<float *>(params[0]), *second = static_cast<float *>(params[1]);
  float *y = static_cast<float *>(params[2]);
  parallel_for_each_vector(element_count(shapes[0], ndims[0]), [=](int64_t i, int count) {
    store_some(y + i, relu(load_some(first + i, count) + load_some(second + i, count)), count);
  });
  return 0;
}
