// The MLP of SkaNet's and VAN's blocks for inference, as one operator: 1x1 convolution, depthwise 3x3, GELU, 1x1
// convolution, scale, shortcut.
//
// The hidden maps, up to eight times as large as the input, never reach the memory: for a strip of rows of an image, some
// hidden channels at a time are computed, convolved, and added to the output. Meanwhile a row is two pixels wider than
// the image: zeros left and right for the 3x3 convolution, whose outputs there are left out at the end. A strip is then
// one long row.
#include "gelu.h"
#include "matrix.h"

namespace mindska {

constexpr int kHidden = 4 * kRows;          // hidden channels at a time
constexpr int64_t kCacheFloats = 300000;    // of a strip: most of a core's second-level cache

struct Mlp {
  const float *x, *bias1, *taps, *bias, *bias2, *scale, *shortcut;
  float *y;
  int64_t height, width, channels, hidden;
  Weights first, second;  // the second in parts of kHidden columns, one after the other
  int64_t padded_rows;    // of a part

  int64_t pitch() const { return width + 2; }

  // Rows [from, to) of an image.
  void strip(int64_t image, int64_t from, int64_t to) const {
    const int64_t top = std::max<int64_t>(from - 1, 0), bottom = std::min(to + 1, height);
    const int64_t inputs = whole_panels((bottom - top) * pitch()), outputs = whole_panels((to - from) * pitch());
    const int64_t stride = (to - from + 2) * pitch() / kLanes * kLanes + 2 * kColumns + kLanes;  // of a hidden channel
    float *copies = scratch(kCopies, inputs * channels), *totals = scratch(kTotals, outputs * channels);
    float *before = scratch(kBefore, stride * kHidden);
    const int64_t at = image * channels * height * width;
    copy(x + at, top, bottom, inputs, copies);
    std::fill(totals, totals + outputs * channels, 0.0f);
    for (int64_t start = 0; start < hidden; start += kHidden) {
      const int64_t count = std::min<int64_t>(kHidden, hidden - start);
      expand(start, count, copies, inputs, before + (top - from + 1) * pitch(), stride);
      for (int64_t i = 0; i < count; ++i) clear_border(before + i * stride, from, to, top, bottom);
      for (int64_t column = 0; column < outputs; column += kColumns) {
        alignas(sizeof(Vec)) float after[kHidden * kColumns];
        for (int64_t i = 0; i < count; ++i) convolve(before + i * stride + column, start + i, after + i * kColumns);
        add(start, count, after, totals + column * channels);
      }
    }
    finish(at, from, to, totals);
  }

 private:
  static int64_t whole_panels(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

  // Rows [top, bottom) of all channels, in panels of kColumns: the place of column c of channel k is
  // (c / kColumns * channels + k) * kColumns + c % kColumns.
  void copy(const float *image, int64_t top, int64_t bottom, int64_t inputs, float *copies) const {
    std::vector<float> line(inputs);
    for (int64_t k = 0; k < channels; ++k) {
      for (int64_t row = top; row < bottom; ++row) {
        std::memcpy(line.data() + (row - top) * pitch() + 1, image + (k * height + row) * width, width * sizeof(float));
      }
      for (int64_t c = 0; c < inputs; c += kColumns) {
        std::memcpy(copies + (c / kColumns * channels + k) * kColumns, line.data() + c, kColumns * sizeof(float));
      }
    }
  }

  // The first convolution's hidden channels from `start` on.
  void expand(int64_t start, int64_t count, const float *copies, int64_t inputs, float *before, int64_t stride) const {
    for (int64_t column = 0; column < inputs; column += kColumns) {
      for (int64_t i0 = 0; i0 < count; i0 += kRows) {
        block<kVectors>(channels, first.block(start + i0), copies + column * channels, [&](int i, int j, Vec value) {
          if (i0 + i >= count) return;
          store(before + (i0 + i) * stride + column + j * kLanes, value + bias1[start + i0 + i]);
        });
      }
    }
  }

  // Zeros around the image in a hidden channel, whose first row is `from` - 1.
  void clear_border(float *before, int64_t from, int64_t to, int64_t top, int64_t bottom) const {
    for (int64_t row = from - 1; row <= to; ++row) {
      float *line = before + (row - from + 1) * pitch();
      if (row < top || row >= bottom) {
        std::fill(line, line + pitch(), 0.0f);
      } else {
        line[0] = line[width + 1] = 0;
      }
    }
  }

  // GELU of the depthwise convolution of a hidden channel, kColumns columns.
  void convolve(const float *before, int64_t channel, float *after) const {
    const float *tap = taps + channel * 9;
    Vec sums[kVectors];
    for (int j = 0; j < kVectors; ++j) sums[j] = splat(bias[channel]);
    for (int64_t row = 0; row < 3; ++row, before += pitch(), tap += 3) {
      for (int column = 0; column < 3; ++column) {
        for (int j = 0; j < kVectors; ++j) sums[j] += tap[column] * load(before + column + j * kLanes);
      }
    }
    for (int j = 0; j < kVectors; ++j) store(after + j * kLanes, gelu(sums[j]));
  }

  // Adds what some hidden channels give to kColumns columns of the output, a channel after the other.
  void add(int64_t start, int64_t count, const float *after, float *totals) const {
    for (int64_t row = 0; row < channels; row += kRows) {
      block<kVectors>(count, second.block(start / kHidden * padded_rows + row), after, [&](int i, int j, Vec value) {
        if (row + i >= channels) return;
        float *total = totals + (row + i) * kColumns + j * kLanes;
        store(total, load(total) + value);
      });
    }
  }

  // The output's rows [from, to) of the image that begins at `at`.
  void finish(int64_t at, int64_t from, int64_t to, const float *totals) const {
    std::vector<float> line(whole_panels((to - from) * pitch()));
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (size_t c = 0; c < line.size(); c += kColumns) {
        std::memcpy(&line[c], totals + c * channels + channel * kColumns, kColumns * sizeof(float));
      }
      for (int64_t row = from; row < to; ++row) {
        const int64_t first = at + (channel * height + row) * width;
        const float *total = &line[(row - from) * pitch()];
        for (int64_t i = 0; i < width; ++i) {
          y[first + i] = shortcut[first + i] + scale[channel] * (total[i] + bias2[channel]);
        }
      }
    }
  }
};

}  // namespace mindska

// Inputs x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N,), taps (N, 1, 3, 3), bias (N,), weight2 (C, N, 1, 1), bias2 (C,),
// scale (C,), shortcut (B, C, H, W); outputs shortcut + scale * mlp(x).
MINDSKA_OPERATOR(mindska_mlp) {
  using namespace mindska;
  const int64_t *shape = shapes[0], hidden = shapes[1][0], channels = shape[1];
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const float *weight1 = input(1), *weight2 = input(5);
  const uint32_t parts = (hidden + kHidden - 1) / kHidden, padded = (channels + kRows - 1) / kRows * kRows;
  const Mlp mlp{input(0), input(2), input(3), input(4), input(6), input(7), input(8), static_cast<float *>(params[9]),
                shape[2], shape[3], channels, hidden,
                Weights(hidden, channels, [=](int64_t row, int64_t k) { return weight1[row * channels + k]; }),
                Weights(parts * padded, kHidden, [=](uint32_t row, uint32_t k) {
                  const uint32_t channel = row % padded, column = row / padded * kHidden + k;
                  return channel < channels && column < hidden ? weight2[channel * hidden + column] : 0;
                }, kMoreWeights),
                padded};
  const int64_t floats = shape[2] * mlp.pitch() * (2 * channels + 2 * kHidden);
  const int64_t strips = std::min(shape[2], std::max((floats + kCacheFloats - 1) / kCacheFloats,
                                                     (threads() + shape[0] - 1) / shape[0]));
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < shape[0] * strips; ++task) {
    const int64_t strip = task % strips;
    mlp.strip(task / strips, strip * shape[2] / strips, (strip + 1) * shape[2] / strips);
  }
  return 0;
}
