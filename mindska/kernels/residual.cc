// A residual branch: scaled for each channel and each sample, and added to its shortcut.
#include "simd.h"

namespace mindska {

// A branch is `first`, or `first` + `second`; tensors of one number stand for those that are not there.
struct Branch {
  const float *first, *second, *scale, *keep;
  int64_t planes, channels, size;
  bool one_for_all;

  Branch(void **params, int64_t **shapes, int *ndims, int scale_at)
      : first(static_cast<float *>(params[0])),
        second(ndims[1] == 4 ? static_cast<float *>(params[1]) : nullptr),
        scale(static_cast<float *>(params[scale_at])),
        keep(static_cast<float *>(params[scale_at + 1])),
        planes(shapes[0][0] * shapes[0][1]),
        channels(shapes[0][1]),
        size(shapes[0][2] * shapes[0][3]),
        one_for_all(shapes[scale_at + 1][0] == 1) {}

  Vec at(int64_t i, int count) const {
    const Vec v = load_some(first + i, count);
    return second ? v + load_some(second + i, count) : v;
  }
  float scale_of(int64_t plane) const { return scale[plane % channels]; }
  float keep_of(int64_t plane) const { return keep[one_for_all ? 0 : plane / channels]; }
};

}  // namespace mindska

// y = shortcut + keep * (scale * (first + second)); one number stands for a second or a shortcut that is not there.
MINDSKA_OPERATOR(mindska_residual,
                 "first (B, C, H, W), second (B, C, H, W) or (1), shortcut (B, C, H, W) or (1), scale (C), keep (B) or (1) "
                 "-> y (B, C, H, W)") {
  using namespace mindska;
  const Branch branch(params, shapes, ndims, 3);
  const float *shortcut = ndims[2] == 4 ? static_cast<float *>(params[2]) : nullptr;
  float *y = static_cast<float *>(params[5]);
#pragma omp parallel for schedule(static) if (branch.planes * branch.size > kAlone)
  for (int64_t plane = 0; plane < branch.planes; ++plane) {
    const float scale = branch.scale_of(plane), keep = branch.keep_of(plane);
    for_each_vector(branch.size, [&](int64_t pixel, int count) {
      const int64_t i = plane * branch.size + pixel;
      const Vec v = branch.at(i, count) * scale * keep;
      store_some(y + i, shortcut ? load_some(shortcut + i, count) + v : v, count);
    });
  }
  return 0;
}

// slope: of first and of second.
MINDSKA_OPERATOR(mindska_residual_grad,
                 "first (B, C, H, W), second (B, C, H, W) or (1), scale (C), keep (B) or (1), dy (B, C, H, W) "
                 "-> slope (B, C, H, W), dscale (C)") {
  using namespace mindska;
  const Branch branch(params, shapes, ndims, 2);
  const float *dy = static_cast<float *>(params[4]);
  float *slope = static_cast<float *>(params[5]), *dscale = static_cast<float *>(params[6]);
  std::vector<float> sums(branch.planes);
#pragma omp parallel for schedule(static) if (branch.planes * branch.size > kAlone)
  for (int64_t plane = 0; plane < branch.planes; ++plane) {
    const float scale = branch.scale_of(plane), keep = branch.keep_of(plane);
    Vec total = {};
    for_each_vector(branch.size, [&](int64_t pixel, int count) {
      const int64_t i = plane * branch.size + pixel;
      const Vec d = load_some(dy + i, count) * keep;
      total += d * branch.at(i, count);
      store_some(slope + i, d * scale, count);
    });
    sums[plane] = sum(total);
  }
  for (int64_t c = 0; c < branch.channels; ++c) {
    dscale[c] = 0;
    for (int64_t plane = c; plane < branch.planes; plane += branch.channels) dscale[c] += sums[plane];
  }
  return 0;
}
