// Depthwise convolution with stride 1, any odd kernel size and any dilation, padded so that the size stays; and its
// gradients.
//
// A plane (one channel of one image) is copied into a buffer with a border of zeros; then every output row is a sum of
// shifted rows, many columns at once in registers. Taps (elements of the kernel) that lie beyond the plane wherever they
// stand (large kernels on small planes) are left out.
//
// Split depthwise convolution is an operator as well: untouched channels, two depthwise convolutions, and the sum with
// the input, without copies of the parts.
#include "activation.h"

namespace mindska {

constexpr int kRowVectors = 4;  // vectors of the output in registers

// One axis of the kernel, without the taps that never meet the plane.
struct KernelAxis {
  int64_t first, count, pad;  // first tap, number of taps, width of the border

  KernelAxis(int64_t taps, int64_t dilation, int64_t size) {
    const int64_t reach = dilation * (taps / 2);
    first = reach < size ? 0 : (reach - size) / dilation + 1;
    count = taps - 2 * first;
    pad = reach - first * dilation;
  }
};

struct Geometry {
  int64_t batch, channels, height, width, taps, kernel_width, dilation;
  KernelAxis rows, columns;
  int64_t stride;  // of the padded plane

  Geometry(const int64_t *x, const int64_t *weight_shape, int64_t dilation)
      : batch(x[0]), channels(x[1]), height(x[2]), width(x[3]), taps(weight_shape[2] * weight_shape[3]),
        kernel_width(weight_shape[3]), dilation(dilation), rows(weight_shape[2], dilation, x[2]),
        columns(weight_shape[3], dilation, x[3]),
        stride(x[3] + 2 * columns.pad) {}

  int64_t plane() const { return height * width; }

  // Floats in a padded plane, and after it what the last vector of a row may read.
  int64_t padded() const { return (height + 2 * rows.pad) * stride + kRowVectors * kLanes; }

  // Copies a plane into a padded one whose border is zero already.
  void pad(const float *from, float *to) const {
    for (int64_t y = 0; y < height; ++y) {
      copy_row(from + y * width, to + (y + rows.pad) * stride + columns.pad, width);
    }
  }
};

// N vectors of R output rows: the sum of the shifted inputs times their weights.
template <int R, int N>
static inline void convolve_block(const Geometry &g, const float *source, const float *weights, float bias,
                                  Vec (&sums)[R][N]) {
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < N; ++i) sums[r][i] = splat(bias);
  }
  for (int64_t ky = 0; ky < g.rows.count; ++ky) {
    const float *row = source + ky * g.dilation * g.stride;
    const float *weight = weights + (ky + g.rows.first) * g.kernel_width + g.columns.first;
    for (int64_t kx = 0; kx < g.columns.count; ++kx) {
      const Vec w = splat(weight[kx]);
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) sums[r][i] += w * load(row + r * g.stride + kx * g.dilation + i * kLanes);
      }
    }
  }
}

// The convolution of a padded plane, kRowVectors vectors at a time, of one row or of several; epilogue(vector) is what is
// written for a vector of sums.
template <typename Epilogue>
static void convolve(const Geometry &g, const float *padded, const float *weights, float bias, float *out,
                     Epilogue epilogue) {
  const auto block = [&](auto rows, auto vectors, int64_t y, int64_t x) {
    constexpr int R = decltype(rows)::value, N = decltype(vectors)::value;
    Vec sums[R][N];
    convolve_block<R, N>(g, padded + y * g.stride + x, weights, bias, sums);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < N; ++i) {
        const int64_t left = g.width - x - i * kLanes;
        store_some(out + (y + r) * g.width + x + i * kLanes, epilogue(sums[r][i]),
                   static_cast<int>(std::min<int64_t>(kLanes, left)));
      }
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, kRowVectors> all;
  for (int64_t y = 0; y < g.height; y += kRowVectors) {
    const int64_t last = std::min(g.height, y + kRowVectors);
    int64_t x = 0;
    for (; x + kRowVectors * kLanes <= g.width; x += kRowVectors * kLanes) {
      for (int64_t row = y; row < last; ++row) block(one, all, row, x);
    }
    for (; x + 2 * kLanes <= g.width; x += 2 * kLanes) {
      int64_t row = y;
      for (; row + 2 <= last; row += 2) block(two, two, row, x);
      for (; row < last; ++row) block(one, two, row, x);
    }
    for (; x < g.width; x += kLanes) {
      if (last == y + kRowVectors) {
        block(all, one, y, x);
      } else {
        for (int64_t row = y; row < last; ++row) block(one, one, row, x);
      }
    }
  }
}

static void convolve(const Geometry &g, const float *padded, const float *weights, float bias, float *out) {
  convolve(g, padded, weights, bias, out, [](Vec v) { return v; });
}

// Adds to sums[tap] the product of an output gradient with the input that the tap saw, in vectors.
static void correlate(const Geometry &g, const float *padded, const float *dy, Vec *sums) {
  for (int64_t y = 0; y < g.height; ++y) {
    for (int64_t x = 0; x < g.width; x += kRowVectors * kLanes) {
      const int64_t left = g.width - x;
      const int vectors = static_cast<int>(std::min<int64_t>(kRowVectors, (left + kLanes - 1) / kLanes));
      Vec gradient[kRowVectors] = {};
      for (int i = 0; i < vectors; ++i) {
        const float *at = dy + y * g.width + x + i * kLanes;
        gradient[i] = left >= (i + 1) * kLanes ? load(at) : load_some(at, static_cast<int>(left - i * kLanes));
      }
      for (int64_t ky = 0; ky < g.rows.count; ++ky) {
        const float *row = padded + (y + ky * g.dilation) * g.stride + x;
        Vec *sum = sums + (ky + g.rows.first) * g.kernel_width + g.columns.first;
        for (int64_t kx = 0; kx < g.columns.count; ++kx) {
          const float *source = row + kx * g.dilation;
          Vec total = sum[kx];
          for (int i = 0; i < vectors; ++i) total += gradient[i] * load(source + i * kLanes);
          sum[kx] = total;
        }
      }
    }
  }
}

// The gradients of one channel, of all images.
class ChannelBackward {
 public:
  ChannelBackward(const Geometry &g) : g_(g), padded_(g.padded()), flipped_(g.taps), sums_(g.taps) {}

  // x, dy and dx: the channel's plane in the first image; `step`: from one image to the next. `pre_activation`: where a
  // GELU follows, its input; dy is then the gradient of its output.
  void operator()(const float *x, const float *weight, const float *dy, int64_t step, float *dx, float *dweight,
                  float *dbias, const float *pre_activation = nullptr) {
    if (pre_activation) dpre_activation_.resize(g_.plane());
    for (int64_t i = 0; i < g_.taps; ++i) flipped_[i] = weight[g_.taps - 1 - i];
    std::fill(sums_.begin(), sums_.end(), Vec{});
    double bias = 0;
    for (int64_t image = 0; image < g_.batch; ++image) {
      const int64_t at = image * step;
      const float *gradient = dy + at;
      if (pre_activation) {
        for_each_vector(g_.plane(), [&](int64_t i, int count) {
          const Vec grad = gelu_grad(load_some(pre_activation + at + i, count), load_some(dy + at + i, count));
          store_some(&dpre_activation_[i], grad, count);
        });
        gradient = dpre_activation_.data();
      }
      g_.pad(x + at, padded_.data());
      correlate(g_, padded_.data(), gradient, sums_.data());
      g_.pad(gradient, padded_.data());
      convolve(g_, padded_.data(), flipped_.data(), 0, dx + at);
      bias += sum_of(gradient, g_.plane());
    }
    for (int64_t i = 0; i < g_.taps; ++i) dweight[i] = sum(sums_[i]);
    *dbias = static_cast<float>(bias);
  }

 private:
  const Geometry &g_;
  std::vector<float> padded_, flipped_, dpre_activation_;
  std::vector<Vec> sums_;
};

// function(geometry, padded plane, weights, bias, offset) for every plane; `params` and `shapes`: mindska_depthwise's.
template <typename Function>
static void parallel_for_each_plane(void **params, int64_t **shapes, Function function) {
  const float *x = static_cast<float *>(params[0]), *weight = static_cast<float *>(params[1]);
  const float *bias = static_cast<float *>(params[2]);
  const Geometry g(shapes[0], shapes[1], *static_cast<int32_t *>(params[3]));
  parallel(g.batch * g.channels, g.batch * g.channels * g.plane(), [&](Tasks &tasks) {
    std::vector<float> padded(g.padded());
    for (const int64_t plane : tasks) {
      const int64_t channel = plane % g.channels, at = plane * g.plane();
      g.pad(x + at, padded.data());
      function(g, padded.data(), weight + channel * g.taps, bias[channel], at);
    }
  });
}

// The gradients of all channels into dx, dweight, dbias. `pre_activation`: where a GELU follows, its input; else null.
static void backward(const float *x, const int64_t *shape, const float *weight, const int64_t *weight_shape,
                     int64_t dilation, const float *dy, const float *pre_activation, void **outputs) {
  float *dx = static_cast<float *>(outputs[0]), *dweight = static_cast<float *>(outputs[1]);
  float *dbias = static_cast<float *>(outputs[2]);
  const Geometry g(shape, weight_shape, dilation);
  parallel(g.channels, g.batch * g.channels * g.plane(), [&](Tasks &tasks) {
    ChannelBackward channel_backward(g);
    for (const int64_t c : tasks) {
      const int64_t at = c * g.plane();
      channel_backward(x + at, weight + c * g.taps, dy + at, g.channels * g.plane(), dx + at, dweight + c * g.taps,
                       dbias + c, pre_activation ? pre_activation + at : nullptr);
    }
  });
}

// The parts of the channels: `untouched` ones, then those of two convolutions.
struct Split {
  Geometry first, second;
  int64_t untouched, step;
  float identity;

  Split(const int64_t *x, const int64_t *weight1_shape, const int64_t *weight2_shape, const int32_t *options)
      : first(x, weight1_shape, options[0]), second(x, weight2_shape, options[1]),
        untouched(x[1] - weight1_shape[0] - weight2_shape[0]),
        step(x[1] * x[2] * x[3]), identity(static_cast<float>(options[2])) {}
};

// to += identity * from, a plane.
static void add_identity(const Split &s, const float *from, float *to) {
  if (s.identity == 0) return;
  for (int64_t i = 0; i < s.first.plane(); ++i) to[i] += s.identity * from[i];
}

}  // namespace mindska

MINDSKA_OPERATOR(mindska_depthwise,
                 "x (B, C, H, W), weight (C, 1, K, L), bias (C), dilation {dilation} -> y (B, C, H, W) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  float *y = static_cast<float *>(params[4]);
  const auto plane = [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, y + at);
  };
  parallel_for_each_plane(params, shapes, plane);
  return 0;
}

// GELU(convolution)
MINDSKA_OPERATOR(mindska_depthwise_gelu,
                 "x (B, C, H, W), weight (C, 1, K, L), bias (C), dilation {dilation} -> y (B, C, H, W) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  float *y = static_cast<float *>(params[4]);
  const auto plane = [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, y + at, gelu);
  };
  parallel_for_each_plane(params, shapes, plane);
  return 0;
}

// GELU(convolution), and its input, which the gradient needs.
MINDSKA_OPERATOR(mindska_depthwise_gelu_with_preactivation,
                 "x (B, C, H, W), weight (C, 1, K, L), bias (C), dilation {dilation} "
                 "-> y (B, C, H, W), pre_activation (B, C, H, W) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  float *y = static_cast<float *>(params[4]), *pre_activation = static_cast<float *>(params[5]);
  const auto plane = [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, pre_activation + at);
    for_each_vector(g.plane(), [&](int64_t i, int count) {
      store_some(y + at + i, gelu(load_some(pre_activation + at + i, count)), count);
    });
  };
  parallel_for_each_plane(params, shapes, plane);
  return 0;
}

MINDSKA_OPERATOR(mindska_depthwise_grad,
                 "x (B, C, H, W), weight (C, 1, K, L), dilation {dilation}, dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight (C, 1, K, L), dbias (C) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  backward(static_cast<float *>(params[0]), shapes[0], static_cast<float *>(params[1]), shapes[1],
           *static_cast<int32_t *>(params[2]), static_cast<float *>(params[3]), nullptr, params + 4);
  return 0;
}

MINDSKA_OPERATOR(mindska_depthwise_gelu_grad,
                 "x (B, C, H, W), weight (C, 1, K, L), dilation {dilation}, dy (B, C, H, W), pre_activation (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight (C, 1, K, L), dbias (C) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  backward(static_cast<float *>(params[0]), shapes[0], static_cast<float *>(params[1]), shapes[1],
           *static_cast<int32_t *>(params[2]), static_cast<float *>(params[3]), static_cast<float *>(params[4]),
           params + 5);
  return 0;
}

// y = identity * x + concat(untouched channels of x, P channels convolved with weight1, Q channels with weight2)
MINDSKA_OPERATOR(mindska_split_depthwise,
                 "x (B, C, H, W), weight1 (P, 1, K, K), bias1 (P), weight2 (Q, 1, L, L), bias2 (Q), "
                 "options {dilation1, dilation2, identity} -> y (B, C, H, W) "
                 "where P + Q <= C, K % 2 == 1, L % 2 == 1, dilation1 >= 1, dilation2 >= 1, "
                 "dilation1 * K <= 4096, dilation2 * L <= 4096") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  const float *weights[] = {static_cast<float *>(params[1]), static_cast<float *>(params[3])};
  const float *biases[] = {static_cast<float *>(params[2]), static_cast<float *>(params[4])};
  float *y = static_cast<float *>(params[6]);
  const Split s(shapes[0], shapes[1], shapes[3], static_cast<int32_t *>(params[5]));
  const Geometry *parts[] = {&s.first, &s.second};
  parallel(s.first.batch * s.first.channels, element_count(shapes[0], 4), [&](Tasks &tasks) {
    std::vector<float> padded[] = {std::vector<float>(s.first.padded()), std::vector<float>(s.second.padded())};
    for (const int64_t plane : tasks) {
      int64_t channel = plane % s.first.channels - s.untouched;
      const float *from = x + plane * s.first.plane();
      float *to = y + plane * s.first.plane();
      if (channel < 0) {
        for (int64_t i = 0; i < s.first.plane(); ++i) to[i] = (1 + s.identity) * from[i];
        continue;
      }
      const int part = channel >= shapes[1][0];
      channel -= part ? shapes[1][0] : 0;
      const Geometry &g = *parts[part];
      g.pad(from, padded[part].data());
      convolve(g, padded[part].data(), weights[part] + channel * g.taps, biases[part][channel], to);
      add_identity(s, from, to);
    }
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_split_depthwise_grad,
                 "x (B, C, H, W), weight1 (P, 1, K, K), weight2 (Q, 1, L, L), options {dilation1, dilation2, identity}, "
                 "dy (B, C, H, W) -> dx (B, C, H, W), dweight1 (P, 1, K, K), dbias1 (P), dweight2 (Q, 1, L, L), dbias2 (Q) "
                 "where P + Q <= C, K % 2 == 1, L % 2 == 1, dilation1 >= 1, dilation2 >= 1, "
                 "dilation1 * K <= 4096, dilation2 * L <= 4096") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *dy = static_cast<float *>(params[4]);
  const float *weights[] = {static_cast<float *>(params[1]), static_cast<float *>(params[2])};
  float *dx = static_cast<float *>(params[5]);
  float *dweights[] = {static_cast<float *>(params[6]), static_cast<float *>(params[8])};
  float *dbiases[] = {static_cast<float *>(params[7]), static_cast<float *>(params[9])};
  const Split s(shapes[0], shapes[1], shapes[2], static_cast<int32_t *>(params[3]));
  const int64_t plane = s.first.plane();
  parallel(s.first.channels, element_count(shapes[0], 4), [&](Tasks &tasks) {
    ChannelBackward channel_backward[] = {ChannelBackward(s.first), ChannelBackward(s.second)};
    for (const int64_t c : tasks) {
      int64_t channel = c - s.untouched;
      const int part = channel >= shapes[1][0];
      if (channel >= 0) {
        channel -= part ? shapes[1][0] : 0;
        const int64_t taps = part ? s.second.taps : s.first.taps;
        channel_backward[part](x + c * plane, weights[part] + channel * taps, dy + c * plane, s.step, dx + c * plane,
                               dweights[part] + channel * taps, dbiases[part] + channel);
      }
      for (int64_t image = 0; image < s.first.batch; ++image) {
        const float *from = dy + image * s.step + c * plane;
        float *to = dx + image * s.step + c * plane;
        if (channel < 0) std::fill(to, to + plane, 0.0f);
        for (int64_t i = 0; i < plane; ++i) to[i] += (channel < 0 ? 1 + s.identity : s.identity) * from[i];
      }
    }
  });
  return 0;
}
