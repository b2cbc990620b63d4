// Depthwise convolution with stride 1, any odd kernel and any dilation, padded so that the size stays; and its gradients.
//
// A plane is copied into a buffer with a border of zeros; then every output row is a sum of shifted rows, many columns at
// once in registers. Taps that lie beyond the plane wherever they stand (large kernels on small maps) are left out.
//
// SkaNet's split over the channels is an operator as well: untouched channels, two depthwise convolutions, and the sum
// with what was split, without copies of the parts.
#include "activation.h"

namespace mindska {

constexpr int kBlock = 4;  // vectors of a row that are computed together

// One axis of the kernel, without the taps that never meet the plane.
struct Axis {
  int64_t first, count, pad;  // tap, number of taps, border

  Axis(int64_t taps, int64_t dilation, int64_t size) {
    const int64_t reach = dilation * (taps / 2);
    first = reach < size ? 0 : (reach - size) / dilation + 1;
    count = taps - 2 * first;
    pad = reach - first * dilation;
  }
};

struct Geometry {
  int64_t batch, channels, height, width, taps, wide, dilation;
  Axis rows, columns;
  int64_t stride;  // of the padded plane

  Geometry(const int64_t *x, const int64_t *kernel, int64_t dilation)
      : batch(x[0]), channels(x[1]), height(x[2]), width(x[3]), taps(kernel[2] * kernel[3]), wide(kernel[3]),
        dilation(dilation), rows(kernel[2], dilation, x[2]), columns(kernel[3], dilation, x[3]),
        stride(x[3] + 2 * columns.pad) {}

  int64_t plane() const { return height * width; }

  // Floats in a padded plane, and beyond it what the last vector of a row may read.
  int64_t padded() const { return (height + 2 * rows.pad) * stride + kBlock * kLanes; }

  // Copies a plane into a padded one whose border is zero already.
  void pad(const float *from, float *to) const {
    for (int64_t y = 0; y < height; ++y) {
      std::memcpy(to + (y + rows.pad) * stride + columns.pad, from + y * width, width * sizeof(float));
    }
  }
};

// N vectors of an output row: the sum of the shifted inputs times their weights.
template <int N>
static inline void row_block(const Geometry &g, const float *source, const float *weights, float bias, Vec *out) {
  Vec sums[N];
  for (int i = 0; i < N; ++i) sums[i] = splat(bias);
  for (int64_t ky = 0; ky < g.rows.count; ++ky) {
    const float *row = source + ky * g.dilation * g.stride;
    const float *weight = weights + (ky + g.rows.first) * g.wide + g.columns.first;
    for (int64_t kx = 0; kx < g.columns.count; ++kx) {
      const Vec w = splat(weight[kx]);
      for (int i = 0; i < N; ++i) sums[i] += w * load(row + kx * g.dilation + i * kLanes);
    }
  }
  for (int i = 0; i < N; ++i) out[i] = sums[i];
}

// finish(vector) is what is written for a sum.
template <typename Finish>
static void convolve(const Geometry &g, const float *padded, const float *weights, float bias, float *out,
                     Finish finish) {
  for (int64_t y = 0; y < g.height; ++y) {
    const float *source = padded + y * g.stride;
    float *row = out + y * g.width;
    int64_t x = 0;
    Vec block[kBlock];
    for (; x + kBlock * kLanes <= g.width; x += kBlock * kLanes) {
      row_block<kBlock>(g, source + x, weights, bias, block);
      for (int i = 0; i < kBlock; ++i) store(row + x + i * kLanes, finish(block[i]));
    }
    for (; x + 2 * kLanes <= g.width; x += 2 * kLanes) {
      row_block<2>(g, source + x, weights, bias, block);
      for (int i = 0; i < 2; ++i) store(row + x + i * kLanes, finish(block[i]));
    }
    for (; x < g.width; x += kLanes) {
      row_block<1>(g, source + x, weights, bias, block);
      store_some(row + x, finish(block[0]), static_cast<int>(std::min<int64_t>(kLanes, g.width - x)));
    }
  }
}

static void convolve(const Geometry &g, const float *padded, const float *weights, float bias, float *out) {
  convolve(g, padded, weights, bias, out, [](Vec v) { return v; });
}

// Adds to sums[tap] the product of an output gradient with the input that the tap saw, in vectors.
static void correlate(const Geometry &g, const float *padded, const float *dout, Vec *sums) {
  for (int64_t y = 0; y < g.height; ++y) {
    for (int64_t x = 0; x < g.width; x += kBlock * kLanes) {
      const int64_t left = g.width - x;
      const int vectors = static_cast<int>(std::min<int64_t>(kBlock, (left + kLanes - 1) / kLanes));
      Vec gradient[kBlock] = {};
      for (int i = 0; i < vectors; ++i) {
        const float *at = dout + y * g.width + x + i * kLanes;
        gradient[i] = left >= (i + 1) * kLanes ? load(at) : load_some(at, static_cast<int>(left - i * kLanes));
      }
      for (int64_t ky = 0; ky < g.rows.count; ++ky) {
        const float *row = padded + (y + ky * g.dilation) * g.stride + x;
        Vec *sum = sums + (ky + g.rows.first) * g.wide + g.columns.first;
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

// One channel's gradients, of all samples: dx is written, weights and bias are returned in place.
class ChannelGradient {
 public:
  ChannelGradient(const Geometry &g) : g_(g), padded_(g.padded()), turned_(g.taps), sums_(g.taps) {}

  // x, dy and dx: the channel's plane in the first sample; `step`: from one sample to the next. `before`: where a GELU
  // follows, its input.
  void operator()(const float *x, const float *weight, const float *dy, int64_t step, float *dx, float *dweight,
                  float *dbias, const float *before = nullptr) {
    if (before) through_.resize(g_.plane());
    for (int64_t i = 0; i < g_.taps; ++i) turned_[i] = weight[g_.taps - 1 - i];
    std::fill(sums_.begin(), sums_.end(), Vec{});
    double bias = 0;
    for (int64_t sample = 0; sample < g_.batch; ++sample) {
      const int64_t at = sample * step;
      const float *gradient = dy + at;
      if (before) {
        for_each_vector(g_.plane(), [&](int64_t i, int count) {
          const Vec slope = gelu_gradient(load_some(before + at + i, count), load_some(dy + at + i, count));
          store_some(&through_[i], slope, count);
        });
        gradient = through_.data();
      }
      g_.pad(x + at, padded_.data());
      correlate(g_, padded_.data(), gradient, sums_.data());
      g_.pad(gradient, padded_.data());
      convolve(g_, padded_.data(), turned_.data(), 0, dx + at);
      bias += sum_of(gradient, g_.plane());
    }
    for (int64_t i = 0; i < g_.taps; ++i) dweight[i] = sum(sums_[i]);
    *dbias = static_cast<float>(bias);
  }

 private:
  const Geometry &g_;
  std::vector<float> padded_, turned_, through_;
  std::vector<Vec> sums_;
};

// function(geometry, padded plane, weights, bias, offset) for every plane; `params` and `shapes`: mindska_depthwise's.
template <typename Function>
static void for_each_plane(void **params, int64_t **shapes, Function function) {
  const float *x = static_cast<float *>(params[0]), *weight = static_cast<float *>(params[1]);
  const float *bias = static_cast<float *>(params[2]);
  const Geometry g(shapes[0], shapes[1], *static_cast<int32_t *>(params[3]));
#pragma omp parallel if (g.batch * g.channels * g.plane() > kAlone)
  {
    std::vector<float> padded(g.padded());
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < g.batch * g.channels; ++plane) {
      const int64_t channel = plane % g.channels, at = plane * g.plane();
      g.pad(x + at, padded.data());
      function(g, padded.data(), weight + channel * g.taps, bias[channel], at);
    }
  }
}

// The gradients of all channels into dx, dweight, dbias. `before`: where a GELU follows, its input; else null.
static void gradients(const float *x, const int64_t *shape, const float *weight, const int64_t *kernel,
                      int64_t dilation, const float *dy, const float *before, void **outputs) {
  float *dx = static_cast<float *>(outputs[0]), *dweight = static_cast<float *>(outputs[1]);
  float *dbias = static_cast<float *>(outputs[2]);
  const Geometry g(shape, kernel, dilation);
#pragma omp parallel if (g.batch * g.channels * g.plane() > kAlone)
  {
    ChannelGradient gradient(g);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < g.channels; ++c) {
      const int64_t at = c * g.plane();
      gradient(x + at, weight + c * g.taps, dy + at, g.channels * g.plane(), dx + at, dweight + c * g.taps, dbias + c,
               before ? before + at : nullptr);
    }
  }
}

// The channels' parts: `untouched` ones, then those of two convolutions.
struct Split {
  Geometry first, second;
  int64_t untouched, step;
  float identity;

  Split(const int64_t *x, const int64_t *kernel1, const int64_t *kernel2, const int32_t *options)
      : first(x, kernel1, options[0]), second(x, kernel2, options[1]), untouched(x[1] - kernel1[0] - kernel2[0]),
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
  for_each_plane(params, shapes, [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, y + at);
  });
  return 0;
}

// GELU of what mindska_depthwise gives.
MINDSKA_OPERATOR(mindska_depthwise_gelu,
                 "x (B, C, H, W), weight (C, 1, K, L), bias (C), dilation {dilation} -> activated (B, C, H, W) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  float *activated = static_cast<float *>(params[4]);
  for_each_plane(params, shapes, [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, activated + at, gelu);
  });
  return 0;
}

// GELU(y), and y.
MINDSKA_OPERATOR(mindska_depthwise_gelu_keeping,
                 "x (B, C, H, W), weight (C, 1, K, L), bias (C), dilation {dilation} "
                 "-> activated (B, C, H, W), y (B, C, H, W) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  float *activated = static_cast<float *>(params[4]), *y = static_cast<float *>(params[5]);
  for_each_plane(params, shapes, [=](const Geometry &g, const float *padded, const float *w, float bias, int64_t at) {
    convolve(g, padded, w, bias, y + at);
    for_each_vector(g.plane(), [&](int64_t i, int count) {
      store_some(activated + at + i, gelu(load_some(y + at + i, count)), count);
    });
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_depthwise_grad,
                 "x (B, C, H, W), weight (C, 1, K, L), dilation {dilation}, dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight (C, 1, K, L), dbias (C) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  gradients(static_cast<float *>(params[0]), shapes[0], static_cast<float *>(params[1]), shapes[1],
            *static_cast<int32_t *>(params[2]), static_cast<float *>(params[3]), nullptr, params + 4);
  return 0;
}

MINDSKA_OPERATOR(mindska_depthwise_gelu_grad,
                 "x (B, C, H, W), weight (C, 1, K, L), dilation {dilation}, dactivated (B, C, H, W), y (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight (C, 1, K, L), dbias (C) "
                 "where K % 2 == 1, L % 2 == 1, dilation >= 1, dilation * K <= 4096, dilation * L <= 4096") {
  using namespace mindska;
  gradients(static_cast<float *>(params[0]), shapes[0], static_cast<float *>(params[1]), shapes[1],
            *static_cast<int32_t *>(params[2]), static_cast<float *>(params[3]), static_cast<float *>(params[4]),
            params + 5);
  return 0;
}

// The last Q channels of y are the second convolution's, the P before them the first's, and the rest is x; each plus
// `identity` times x.
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
#pragma omp parallel if (size_of(shapes[0], 4) > kAlone)
  {
    std::vector<float> padded[] = {std::vector<float>(s.first.padded()), std::vector<float>(s.second.padded())};
#pragma omp for schedule(dynamic, 4)
    for (int64_t plane = 0; plane < s.first.batch * s.first.channels; ++plane) {
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
  }
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
#pragma omp parallel if (size_of(shapes[0], 4) > kAlone)
  {
    ChannelGradient gradients[] = {ChannelGradient(s.first), ChannelGradient(s.second)};
#pragma omp for schedule(dynamic, 4)
    for (int64_t c = 0; c < s.first.channels; ++c) {
      int64_t channel = c - s.untouched;
      const int part = channel >= shapes[1][0];
      if (channel >= 0) {
        channel -= part ? shapes[1][0] : 0;
        const int64_t taps = part ? s.second.taps : s.first.taps;
        gradients[part](x + c * plane, weights[part] + channel * taps, dy + c * plane, s.step, dx + c * plane,
                        dweights[part] + channel * taps, dbiases[part] + channel);
      }
      for (int64_t sample = 0; sample < s.first.batch; ++sample) {
        const float *from = dy + sample * s.step + c * plane;
        float *to = dx + sample * s.step + c * plane;
        if (channel < 0) std::fill(to, to + plane, 0.0f);
        for (int64_t i = 0; i < plane; ++i) to[i] += (channel < 0 ? 1 + s.identity : s.identity) * from[i];
      }
    }
  }
  return 0;
}
