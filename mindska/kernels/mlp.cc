// The MLP of SkaNet's and VAN's blocks as one operator: 1x1 convolution, depthwise 3x3, GELU, 1x1 convolution; its
// gradients; and for inference with scale and shortcut.
//
// The hidden maps, up to eight times as large as the input, never reach the memory: for a strip of rows of an image, some
// hidden channels at a time are computed, convolved, and added to the output; the gradient computes them again.
// Meanwhile a row is two pixels wider than the image: zeros left and right for the 3x3 convolution, whose outputs there
// are left out at the end. A strip is then one long row.
#include "activation.h"
#include "matrix.h"

namespace mindska {

constexpr int kHidden = 4 * kRows;        // hidden channels at a time
constexpr int64_t kCacheFloats = 300000;  // of a strip: most of a core's second-level cache

// Rows [from, to) of an image, and the layout of the buffers for them: a channel's padded rows side by side, from row
// `from` - kHalo on, with some room before and behind them. Pixel (y, x) lies at row(y) + x + 1.
struct Strip {
  static constexpr int64_t kHalo = 2;
  int64_t height, width, from, to;

  int64_t pitch() const { return width + 2; }
  int64_t rows() const { return to - from; }
  int64_t row(int64_t y) const { return kLanes + (y - from + kHalo) * pitch(); }  // where image row y begins
  // Columns for `rows` rows, in whole panels.
  int64_t columns(int64_t rows) const { return (rows * pitch() + kColumns - 1) / kColumns * kColumns; }
  // From one channel to the next: room for what lies beyond the last panel; no power of two, whose rows would contend
  // for the cache's places.
  int64_t stride() const { return (((rows() + 2 * kHalo) * pitch() + 2 * kColumns) / kLanes + 1 | 1) * kLanes; }

  // Image rows [from - before, to + before), as far as they exist, of all channels.
  void copy(const float *image, int64_t channels, int64_t before, float *buffer) const {
    std::fill(buffer, buffer + channels * stride(), 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = std::max<int64_t>(from - before, 0); y < std::min(to + before, height); ++y) {
        std::memcpy(buffer + c * stride() + row(y) + 1, image + (c * height + y) * width, width * sizeof(float));
      }
    }
  }

  // Zeros wherever rows [first, last) of a channel are not the image's.
  void clear_border(float *channel, int64_t first, int64_t last) const {
    for (int64_t y = first; y < last; ++y) {
      float *line = channel + row(y);
      if (y < 0 || y >= height) {
        std::fill(line, line + pitch(), 0.0f);
      } else {
        line[0] = line[width + 1] = 0;
      }
    }
  }
};

// The 3x3 convolution at kColumns columns; `at` is the upper left of what the first of them sees.
static inline void three_by_three(const float *at, int64_t pitch, const float *taps, float bias, Vec (&sums)[kVectors]) {
  for (int j = 0; j < kVectors; ++j) sums[j] = splat(bias);
  for (int64_t row = 0; row < 3; ++row, at += pitch, taps += 3) {
    for (int column = 0; column < 3; ++column) {
      for (int j = 0; j < kVectors; ++j) sums[j] += taps[column] * load(at + column + j * kLanes);
    }
  }
}

// A product of weights with rows [first, last) of a strip; finish(row, place, value) takes a vector of it.
template <typename Finish>
static inline void product(const Strip &s, const Weights &weights, int64_t start, int64_t count, const float *right,
                           int64_t depth, int64_t first, int64_t last, Finish finish) {
  const int64_t begin = s.row(first), columns = s.columns(last - first);
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t i0 = 0; i0 < count; i0 += kRows) {
      block<kVectors>(depth, weights.block(start + i0), right + begin + column, s.stride(), [&](int i, int j, Vec value) {
        if (i0 + i < count) finish(i0 + i, begin + column + j * kLanes, value);
      });
    }
  }
}

struct Mlp {
  const float *x, *bias1, *taps, *bias, *bias2;
  int64_t height, width, channels, hidden;
  Weights first;   // (hidden, channels)
  Weights second;  // (channels, hidden), in parts of kHidden columns one after the other; for gradients, turned

  // The strips of an image, at least so many, when a pixel takes `floats` floats of the cache.
  int64_t strips(int64_t floats, int64_t least) const {
    const int64_t wanted = (height * (width + 2) * floats + kCacheFloats - 1) / kCacheFloats;
    return std::min(height, std::max(wanted, least));
  }

  // The hidden channels' values before the 3x3 convolution, rows [from - before, to + before).
  void expand(const Strip &s, int64_t start, int64_t count, const float *inputs, int64_t before, float *values) const {
    const int64_t top = std::max<int64_t>(s.from - before, 0), bottom = std::min(s.to + before, height);
    product(s, first, start, count, inputs, channels, top, bottom, [&](int64_t i, int64_t place, Vec value) {
      store(values + i * s.stride() + place, value + bias1[start + i]);
    });
    for (int64_t i = 0; i < count; ++i) s.clear_border(values + i * s.stride(), s.from - before, s.to + before);
  }

  // finish(first, row, pixels) takes rows of the output: `first` is the place of the first pixel in all maps.
  template <typename Finish>
  void strip(int64_t image, int64_t from, int64_t to, Finish finish) const {
    const Strip s{height, width, from, to};
    float *inputs = scratch(kCopies, s.stride() * channels), *before = scratch(kBefore, s.stride() * kHidden);
    const int64_t outputs = s.columns(s.rows()), at = image * channels * height * width;
    float *totals = scratch(kTotals, outputs * channels);  // panels of kColumns, a channel after the other
    s.copy(x + at, channels, 1, inputs);
    std::fill(totals, totals + outputs * channels, 0.0f);
    std::fill(before, before + s.stride() * kHidden, 0.0f);
    const int64_t padded_rows = Weights::padded(channels);
    for (int64_t start = 0; start < hidden; start += kHidden) {
      const int64_t count = std::min<int64_t>(kHidden, hidden - start);
      expand(s, start, count, inputs, 1, before);
      for (int64_t column = 0; column < outputs; column += kColumns) {
        alignas(sizeof(Vec)) float after[kHidden * kColumns];
        for (int64_t i = 0; i < count; ++i) {
          Vec sums[kVectors];
          three_by_three(before + i * s.stride() + s.row(from - 1) + column, s.pitch(), taps + (start + i) * 9,
                         bias[start + i], sums);
          for (int j = 0; j < kVectors; ++j) store(after + i * kColumns + j * kLanes, gelu(sums[j]));
        }
        for (int64_t row = 0; row < channels; row += kRows) {
          block<kVectors>(count, second.block(start / kHidden * padded_rows + row), after, kColumns,
                          [&](int i, int j, Vec value) {
                            if (row + i >= channels) return;
                            float *total = totals + column * channels + (row + i) * kColumns + j * kLanes;
                            store(total, load(total) + value);
                          });
        }
      }
    }
    std::vector<float> line(outputs);
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t c = 0; c < outputs; c += kColumns) {
        std::memcpy(&line[c], totals + c * channels + channel * kColumns, kColumns * sizeof(float));
      }
      for (int64_t y = from; y < to; ++y) {
        finish(at + (channel * height + y) * width, channel, &line[(y - from) * s.pitch()]);
      }
    }
  }

  // finish as above, for all images and strips.
  template <typename Finish>
  void run(int64_t batch, Finish finish) const {
    const int64_t count = strips(2 * channels + 2 * kHidden, (threads() + batch - 1) / batch);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < batch * count; ++task) {
      const int64_t number = task % count;
      strip(task / count, number * height / count, (number + 1) * height / count, finish);
    }
  }
};

// Weights (channels, hidden), in parts of kHidden columns. element(channel, column) are the values.
template <typename Element>
static Weights in_parts(uint32_t channels, uint32_t hidden, Purpose purpose, Element element) {
  const uint32_t parts = (hidden + kHidden - 1) / kHidden, padded = Weights::padded(channels);
  const auto padded_element = [=](uint32_t row, uint32_t k) {
    const uint32_t channel = row % padded, column = row / padded * kHidden + k;
    return channel < channels && column < hidden ? element(channel, column) : 0;
  };
  return Weights(parts * padded, kHidden, padded_element, purpose);
}

// What an image adds to the gradients of weights and biases.
struct Slopes {
  std::vector<float> weight1, bias1, taps, bias, weight2, bias2;

  Slopes(int64_t channels, int64_t hidden)
      : weight1(hidden * channels), bias1(hidden), taps(hidden * 9), bias(hidden), weight2(channels * hidden),
        bias2(channels) {}
};

// Adds to slopes[tap] the products of the gradients of a strip's own rows with what the tap saw.
static inline void correlate(const Strip &s, const float *values, const float *gradient, float *slopes) {
  const int64_t own = s.row(s.from);
  Vec sums[9] = {};
  for_each_vector(s.rows() * s.pitch(), [&](int64_t i, int n) {
    const Vec slope = load_some(gradient + own + i, n);
    const float *at = values + own + i - s.pitch() - 1;
    for (int64_t t = 0; t < 9; ++t) sums[t] += slope * load(at + t / 3 * s.pitch() + t % 3);
  });
  for (int64_t t = 0; t < 9; ++t) slopes[t] += sum(sums[t]);
}

// Gradients of a strip: dx is written, `slopes` added to. `turned`: the first convolution's weights (channels, hidden).
static void gradients(const Mlp &m, const Weights &turned, const Strip &s, const float *x, const float *dy, float *dx,
                      Slopes *slopes) {
  const int64_t stride = s.stride(), channels = m.channels, whole = s.columns(s.rows()), pitch = s.pitch();
  const int64_t padded_rows = Weights::padded(channels);
  float *inputs = scratch(kCopies, stride * channels), *outer = scratch(kLefts, stride * channels);
  float *totals = scratch(kTotals, stride * channels), *before = scratch(kBefore, stride * kHidden);
  float *after = scratch(kAfter, stride * kHidden), *inner = scratch(kSlopes, stride * kHidden);
  s.copy(x, channels, 2, inputs);
  s.copy(dy, channels, 1, outer);
  std::fill(totals, totals + stride * channels, 0.0f);
  for (float *buffer : {before, after, inner}) std::fill(buffer, buffer + stride * kHidden, 0.0f);
  // Products with the weights take a row more; those over pixels take the strip's own rows only.
  const int64_t own = s.row(s.from), length = s.rows() * pitch;
  for (int64_t c = 0; c < channels; ++c) slopes->bias2[c] += sum_of(outer + c * stride + own, length);
  for (int64_t start = 0; start < m.hidden; start += kHidden) {
    const int64_t count = std::min<int64_t>(kHidden, m.hidden - start);
    m.expand(s, start, count, inputs, 2, before);
    const int64_t top = std::max<int64_t>(s.from - 1, 0), bottom = std::min(s.to + 1, s.height);
    product(s, m.second, start, count, outer, channels, top, bottom,
            [&](int64_t i, int64_t place, Vec value) { store(inner + i * stride + place, value); });
    for (int64_t i = 0; i < count; ++i) {
      float *values = before + i * stride, *slope = inner + i * stride, *active = after + i * stride;
      const float *taps = m.taps + (start + i) * 9;
      // Through the GELU: `slope` is then the gradient of the 3x3 convolution's output.
      for (int64_t column = s.row(top); column < s.row(top) + s.columns(bottom - top); column += kColumns) {
        Vec sums[kVectors];
        three_by_three(values + column - pitch - 1, pitch, taps, m.bias[start + i], sums);
        for (int j = 0; j < kVectors; ++j) {
          float *at = slope + column + j * kLanes;
          Vec result;
          store(at, gelu_and_gradient(sums[j], load(at), &result));
          store(active + column + j * kLanes, result);
        }
      }
      // The last panel may reach beyond the last row, and the products over pixels into the next one.
      s.clear_border(slope, s.from - 1, s.to + 1);
      std::fill(slope + s.row(s.to + 1), slope + stride, 0.0f);
      std::fill(active + own + length, active + own + length + kLanes, 0.0f);
      slopes->bias[start + i] += sum_of(slope + own, length);
      correlate(s, values, slope, &slopes->taps[(start + i) * 9]);
    }
    all_dots({outer + own, stride}, channels, {after + own, stride}, count, length, &slopes->weight2[start], m.hidden);
    for (int64_t i = 0; i < count; ++i) {
      // Through the 3x3 convolution: in place of `after`.
      float turned_taps[9], *result = after + i * stride;
      for (int64_t t = 0; t < 9; ++t) turned_taps[t] = m.taps[(start + i) * 9 + 8 - t];
      for (int64_t column = own; column < own + whole; column += kColumns) {
        Vec sums[kVectors];
        three_by_three(inner + i * stride + column - pitch - 1, pitch, turned_taps, 0, sums);
        for (int j = 0; j < kVectors; ++j) store(result + column + j * kLanes, sums[j]);
      }
      s.clear_border(result, s.from, s.to);
      std::fill(result + s.row(s.to), result + stride, 0.0f);
      slopes->bias1[start + i] += sum_of(result + own, length);
    }
    all_dots({after + own, stride}, count, {inputs + own, stride}, channels, length,
             &slopes->weight1[start * channels], channels);
    product(s, turned, start / kHidden * padded_rows, channels, after, count, s.from, s.to,
            [&](int64_t i, int64_t place, Vec value) {
              float *total = totals + i * stride + place;
              store(total, load(total) + value);
            });
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = s.from; y < s.to; ++y) {
      std::memcpy(dx + (c * s.height + y) * s.width, totals + c * stride + s.row(y) + 1, s.width * sizeof(float));
    }
  }
}

// The network of an operator's inputs.
static Mlp mlp_of(void **params, int64_t **shapes, bool for_gradients) {
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const int64_t hidden = shapes[1][0], channels = shapes[0][1];
  const float *weight1 = input(1), *weight2 = input(5);
  const auto first = [=](int64_t row, int64_t k) { return weight1[row * channels + k]; };
  const auto second = [=](int64_t channel, int64_t column) { return weight2[channel * hidden + column]; };
  const auto turned = [=](int64_t row, int64_t k) { return weight2[k * hidden + row]; };
  return {input(0), input(2), input(3), input(4), for_gradients ? nullptr : input(6), shapes[0][2], shapes[0][3],
          channels, hidden, Weights(hidden, channels, first),
          for_gradients ? Weights(hidden, channels, turned, kMoreWeights)
                        : in_parts(channels, hidden, kMoreWeights, second)};
}

}  // namespace mindska

MINDSKA_OPERATOR(mindska_mlp,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), taps (N, 1, 3, 3), bias (N), weight2 (C, N, 1, 1), "
                 "bias2 (C) -> y (B, C, H, W) where C <= 65536, N <= 65536") {
  using namespace mindska;
  const Mlp mlp = mlp_of(params, shapes, false);
  float *y = static_cast<float *>(params[7]);
  mlp.run(shapes[0][0], [&](int64_t first, int64_t channel, const float *pixels) {
    for (int64_t i = 0; i < mlp.width; ++i) y[first + i] = pixels[i] + mlp.bias2[channel];
  });
  return 0;
}

// shortcut + scale * mlp(x)
MINDSKA_OPERATOR(mindska_mlp_added,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), taps (N, 1, 3, 3), bias (N), weight2 (C, N, 1, 1), "
                 "bias2 (C), scale (C), shortcut (B, C, H, W) -> y (B, C, H, W) where C <= 65536, N <= 65536") {
  using namespace mindska;
  const Mlp mlp = mlp_of(params, shapes, false);
  const float *scale = static_cast<float *>(params[7]), *shortcut = static_cast<float *>(params[8]);
  float *y = static_cast<float *>(params[9]);
  mlp.run(shapes[0][0], [&](int64_t first, int64_t channel, const float *pixels) {
    for (int64_t i = 0; i < mlp.width; ++i) {
      y[first + i] = shortcut[first + i] + scale[channel] * (pixels[i] + mlp.bias2[channel]);
    }
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_mlp_grad,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), taps (N, 1, 3, 3), bias (N), weight2 (C, N, 1, 1), "
                 "dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight1 (N, C, 1, 1), dbias1 (N), dtaps (N, 1, 3, 3), dbias (N), dweight2 (C, N, 1, 1), "
                 "dbias2 (C) where C <= 65536, N <= 65536") {
  using namespace mindska;
  const Mlp mlp = mlp_of(params, shapes, true);
  const float *dy = static_cast<float *>(params[6]), *weight1 = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[7]);
  const int64_t batch = shapes[0][0], image = mlp.channels * mlp.height * mlp.width, channels = mlp.channels;
  const Weights turned = in_parts(channels, mlp.hidden, kEvenMoreWeights, [=](int64_t channel, int64_t column) {
    return weight1[column * channels + channel];
  });
  // Each image's own sums, strip by strip, then their sum in the order of the images: the same whatever the number of
  // threads.
  const int64_t count = mlp.strips(3 * channels + 3 * kHidden, 1);
  std::vector<Slopes> slopes(batch, Slopes(channels, mlp.hidden));
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t strip = 0; strip < count; ++strip) {
      const Strip s{mlp.height, mlp.width, strip * mlp.height / count, (strip + 1) * mlp.height / count};
      gradients(mlp, turned, s, mlp.x + i * image, dy + i * image, dx + i * image, &slopes[i]);
    }
  }
  std::vector<float> Slopes::*parts[] = {&Slopes::weight1, &Slopes::bias1,   &Slopes::taps,
                                         &Slopes::bias,    &Slopes::weight2, &Slopes::bias2};
  for (int part = 0; part < 6; ++part) {
    float *to = static_cast<float *>(params[8 + part]);
    const size_t size = (slopes[0].*parts[part]).size();
#pragma omp parallel for schedule(static) if (static_cast<int64_t>(size * slopes.size()) > kAlone)
    for (size_t j = 0; j < size; ++j) {
      float total = 0;
      for (const Slopes &own : slopes) total += (own.*parts[part])[j];
      to[j] = total;
    }
  }
  return 0;
}
