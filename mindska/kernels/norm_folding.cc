// Batch norms in evaluation, folded into the convolutions next to them: sums over weights, not over feature maps. As
// MindSpore's operators these are a dozen of very small ones, each of which takes longer to start than to run.
#include "simd.h"

// In evaluation norm(x) = scale * x + shift.
MINDSKA_OPERATOR(mindska_norm_scale_shift,
                 "gamma (C), beta (C), mean (C), variance (C), eps (1) -> scale (C), shift (C)") {
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  float *scale = static_cast<float *>(params[5]), *shift = static_cast<float *>(params[6]);
  for (int64_t c = 0; c < shapes[0][0]; ++c) {
    scale[c] = input(0)[c] / std::sqrt(input(3)[c] + input(4)[0]);
    shift[c] = input(1)[c] - input(2)[c] * scale[c];
  }
  return 0;
}

// The weight and bias with which the 1x1 convolution of x is that of scale * x + shift.
MINDSKA_OPERATOR(mindska_fold_norm_into_next_conv,
                 "weight (O, C, 1, 1), bias (O), scale (C), shift (C) -> new_weight (O, C, 1, 1), new_bias (O)") {
  using namespace mindska;
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const int64_t outputs = shapes[0][0], channels = shapes[0][1];
  float *weight = static_cast<float *>(params[4]), *bias = static_cast<float *>(params[5]);
  parallel_for(outputs, outputs * channels, [&](int64_t o) {
    const float *from = input(0) + o * channels;
    Vec total = {};
    for_each_vector(channels, [&](int64_t i, int n) {
      const Vec values = load_some(from + i, n);
      store_some(weight + o * channels + i, values * load_some(input(2) + i, n), n);
      total += values * load_some(input(3) + i, n);
    });
    bias[o] = input(1)[o] + sum(total);
  });
  return 0;
}
