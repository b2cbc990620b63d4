// An MLP with a depthwise convolution as one operator: 1x1 convolution, depthwise 3x3, GELU, 1x1 convolution; its
// gradients; and with scale and shortcut.
//
// The hidden feature maps, up to eight times as large as the input, never reach the memory: for a strip of rows of an
// image, a block of hidden channels is computed, convolved, and added to the output; the gradient computes it again.
// Meanwhile a row is two pixels wider than the image: zeros left and right for the 3x3 convolution, whose outputs there
// are left out at the end. A strip is then one long row.
#include "activation.h"
#include "matrix.h"

namespace mindska {

constexpr int kHiddenBlock = 4 * kBlockRows;  // hidden channels of a block
// Floats of a strip's buffers: most of a core's second-level cache. Chosen on two cores of an x86-64 with AVX-512.
constexpr int64_t kStripFloats = 300000;

// Rows [from, to) of an image, and the layout of the buffers for them: a channel's padded rows one after the other, from
// row `from` - kHalo on, with some room before and after them. Pixel (y, x) lies at row(y) + x + 1.
struct Strip {
  static constexpr int64_t kHalo = 2;  // rows above and below that the gradient needs
  int64_t height, width, from, to;

  int64_t pitch() const { return width + 2; }
  int64_t rows() const { return to - from; }
  int64_t row(int64_t y) const { return kLanes + (y - from + kHalo) * pitch(); }  // where image row y begins
  // Columns for `rows` rows, in whole panels.
  int64_t columns(int64_t rows) const { return (rows * pitch() + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }
  // From one channel to the next: room for what lies beyond the last panel; no power of two, whose rows would share few
  // sets of the cache.
  int64_t stride() const { return ((((rows() + 2 * kHalo) * pitch() + 2 * kPanelColumns) / kLanes + 1) | 1) * kLanes; }

  // Image rows [from - halo, to + halo), as far as they exist, of all channels.
  void copy(const float *image, int64_t channels, int64_t halo, float *buffer) const {
    std::fill(buffer, buffer + channels * stride(), 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = std::max<int64_t>(from - halo, 0); y < std::min(to + halo, height); ++y) {
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

// The 3x3 convolution at kPanelColumns columns; `at` is the upper left of what the first of them sees.
static inline void convolve_3x3(const float *at, int64_t pitch, const float *weight, float bias,
                                Vec (&sums)[kBlockVectors]) {
  for (int j = 0; j < kBlockVectors; ++j) sums[j] = splat(bias);
  for (int64_t row = 0; row < 3; ++row, at += pitch, weight += 3) {
    for (int column = 0; column < 3; ++column) {
      for (int j = 0; j < kBlockVectors; ++j) sums[j] += weight[column] * load(at + column + j * kLanes);
    }
  }
}

// Rows [start, start + count) of A, times rows [first, last) of a strip. epilogue(row, place, value) takes each vector of
// the product.
template <typename Epilogue>
static inline void multiply_strip(const Strip &s, const PackedView &a, int64_t start, int64_t count, const float *right,
                                  int64_t depth, int64_t first, int64_t last, Epilogue epilogue) {
  const int64_t begin = s.row(first), columns = s.columns(last - first);
  for (int64_t column = 0; column < columns; column += kPanelColumns) {
    for (int64_t i0 = 0; i0 < count; i0 += kBlockRows) {
      const auto block_epilogue = [&](int i, int j, Vec value) {
        if (i0 + i < count) epilogue(i0 + i, begin + column + j * kLanes, value);
      };
      multiply_block<kBlockVectors>(depth, a.block(start + i0), right + begin + column, s.stride(), block_epilogue);
    }
  }
}

struct FusedMlp {
  const float *x, *bias1, *dw_weight, *dw_bias, *bias2;
  int64_t height, width, channels, hidden;
  PackedMatrix weight1;  // (hidden, channels)
  PackedMatrix weight2;  // forward: (channels, hidden), see pack_hidden_blocks; for the gradient: (hidden, channels)

  // The strips of an image, at least so many, when a pixel takes `floats` floats of the buffers.
  int64_t strips(int64_t floats, int64_t least) const {
    const int64_t wanted = (height * (width + 2) * floats + kStripFloats - 1) / kStripFloats;
    return std::min(height, std::max(wanted, least));
  }

  // A block of the first convolution's outputs, rows [from - halo, to + halo).
  void expand(const Strip &s, int64_t start, int64_t count, const float *inputs, int64_t halo, float *expanded) const {
    const int64_t top = std::max<int64_t>(s.from - halo, 0), bottom = std::min(s.to + halo, height);
    multiply_strip(s, weight1, start, count, inputs, channels, top, bottom, [&](int64_t i, int64_t place, Vec value) {
      store(expanded + i * s.stride() + place, value + bias1[start + i]);
    });
    for (int64_t i = 0; i < count; ++i) s.clear_border(expanded + i * s.stride(), s.from - halo, s.to + halo);
  }

  // epilogue(first, channel, pixels) takes rows of the output: `first` is the place of the first pixel in all images.
  template <typename Epilogue>
  void forward_strip(int64_t image, int64_t from, int64_t to, Epilogue epilogue) const {
    const Strip s{height, width, from, to};
    const int64_t outputs = s.columns(s.rows()), at = image * channels * height * width;
    const Workspace input_buffer(Slot::kPaddedInput, s.stride() * channels);
    const Workspace expanded_buffer(Slot::kExpanded, s.stride() * kHiddenBlock);
    const Workspace accumulator(Slot::kAccumulator, outputs * channels);  // panels, a channel after the other
    float *inputs = input_buffer.data(), *expanded = expanded_buffer.data(), *totals = accumulator.data();
    s.copy(x + at, channels, 1, inputs);
    std::fill(totals, totals + outputs * channels, 0.0f);
    std::fill(expanded, expanded + s.stride() * kHiddenBlock, 0.0f);
    const int64_t padded_rows = PackedMatrix::padded_rows(channels);
    for (int64_t start = 0; start < hidden; start += kHiddenBlock) {
      const int64_t count = std::min<int64_t>(kHiddenBlock, hidden - start);
      expand(s, start, count, inputs, 1, expanded);
      for (int64_t column = 0; column < outputs; column += kPanelColumns) {
        alignas(sizeof(Vec)) float activated[kHiddenBlock * kPanelColumns];
        for (int64_t i = 0; i < count; ++i) {
          Vec sums[kBlockVectors];
          convolve_3x3(expanded + i * s.stride() + s.row(from - 1) + column, s.pitch(), dw_weight + (start + i) * 9,
                       dw_bias[start + i], sums);
          for (int j = 0; j < kBlockVectors; ++j) store(activated + i * kPanelColumns + j * kLanes, gelu(sums[j]));
        }
        for (int64_t row = 0; row < channels; row += kBlockRows) {
          const PackedBlock left = weight2.block(start / kHiddenBlock * padded_rows + row);
          multiply_block<kBlockVectors>(count, left, activated, kPanelColumns, [&](int i, int j, Vec value) {
            if (row + i >= channels) return;
            float *total = totals + column * channels + (row + i) * kPanelColumns + j * kLanes;
            store(total, load(total) + value);
          });
        }
      }
    }
    std::vector<float> line(outputs);
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t c = 0; c < outputs; c += kPanelColumns) {
        std::memcpy(&line[c], totals + c * channels + channel * kPanelColumns, kPanelColumns * sizeof(float));
      }
      for (int64_t y = from; y < to; ++y) {
        epilogue(at + (channel * height + y) * width, channel, &line[(y - from) * s.pitch()]);
      }
    }
  }

  // For all images and strips; epilogue as above.
  template <typename Epilogue>
  void forward(int64_t batch, Epilogue epilogue) const {
    const int64_t count = strips(2 * channels + 2 * kHiddenBlock, (mindska_threads() + batch - 1) / batch);
    parallel_for(batch * count, kAlwaysParallel, [&](int64_t task) {
      const int64_t strip = task % count;
      forward_strip(task / count, strip * height / count, (strip + 1) * height / count, epilogue);
    });
  }
};

// A matrix (channels, hidden) in parts of kHiddenBlock columns, one below the other; its values are
// element(channel, column).
template <typename Element>
static PackedMatrix pack_hidden_blocks(uint32_t channels, uint32_t hidden, Slot slot, Element element) {
  const uint32_t parts = (hidden + kHiddenBlock - 1) / kHiddenBlock, padded = PackedMatrix::padded_rows(channels);
  const auto padded_element = [=](uint32_t row, uint32_t k) {
    const uint32_t channel = row % padded, column = row / padded * kHiddenBlock + k;
    return channel < channels && column < hidden ? element(channel, column) : 0;
  };
  return PackedMatrix(parts * padded, kHiddenBlock, padded_element, slot);
}

// What an image adds to the gradients of weights and biases.
struct MlpGradients {
  std::vector<float> weight1, bias1, dw_weight, dw_bias, weight2, bias2;

  MlpGradients(int64_t channels, int64_t hidden)
      : weight1(hidden * channels), bias1(hidden), dw_weight(hidden * 9), dw_bias(hidden), weight2(channels * hidden),
        bias2(channels) {}
};

// Adds to dweight[tap] the products of the gradients dy of a strip's interior rows with what the tap saw of x.
static inline void correlate(const Strip &s, const float *x, const float *dy, float *dweight) {
  const int64_t interior = s.row(s.from);
  Vec sums[9] = {};
  for_each_vector(s.rows() * s.pitch(), [&](int64_t i, int n) {
    const Vec grad = load_some(dy + interior + i, n);
    const float *at = x + interior + i - s.pitch() - 1;
    for (int64_t t = 0; t < 9; ++t) sums[t] += grad * load(at + t / 3 * s.pitch() + t % 3);
  });
  for (int64_t t = 0; t < 9; ++t) dweight[t] += sum(sums[t]);
}

// The gradients of a strip: dx is written, `grads` added to. weight1_transposed: (channels, hidden), of
// pack_hidden_blocks.
static void backward_strip(const FusedMlp &m, const PackedView &weight1_transposed, const Strip &s, const float *x,
                           const float *dy, float *dx, MlpGradients *grads) {
  const int64_t stride = s.stride(), channels = m.channels, outputs = s.columns(s.rows()), pitch = s.pitch();
  const int64_t padded_rows = PackedMatrix::padded_rows(channels);
  const Workspace input_buffer(Slot::kPaddedInput, stride * channels);
  const Workspace gradient_buffer(Slot::kPaddedGradient, stride * channels);
  const Workspace accumulator(Slot::kAccumulator, stride * channels);
  const Workspace expanded_buffer(Slot::kExpanded, stride * kHiddenBlock);
  const Workspace activated_buffer(Slot::kActivated, stride * kHiddenBlock);
  const Workspace hidden_gradient(Slot::kHiddenGradient, stride * kHiddenBlock);
  float *inputs = input_buffer.data(), *padded_dy = gradient_buffer.data(), *totals = accumulator.data();
  float *expanded = expanded_buffer.data(), *activated = activated_buffer.data(), *dhidden = hidden_gradient.data();
  s.copy(x, channels, 2, inputs);
  s.copy(dy, channels, 1, padded_dy);
  std::fill(totals, totals + stride * channels, 0.0f);
  for (float *buffer : {expanded, activated, dhidden}) std::fill(buffer, buffer + stride * kHiddenBlock, 0.0f);
  // Products with the weights take a row more above and below; those over pixels take the interior rows only.
  const int64_t interior = s.row(s.from), length = s.rows() * pitch;
  for (int64_t c = 0; c < channels; ++c) grads->bias2[c] += sum_of(padded_dy + c * stride + interior, length);
  for (int64_t start = 0; start < m.hidden; start += kHiddenBlock) {
    const int64_t count = std::min<int64_t>(kHiddenBlock, m.hidden - start);
    m.expand(s, start, count, inputs, 2, expanded);
    const int64_t top = std::max<int64_t>(s.from - 1, 0), bottom = std::min(s.to + 1, s.height);
    multiply_strip(s, m.weight2, start, count, padded_dy, channels, top, bottom,
                   [&](int64_t i, int64_t place, Vec value) { store(dhidden + i * stride + place, value); });
    for (int64_t i = 0; i < count; ++i) {
      float *values = expanded + i * stride, *grad = dhidden + i * stride, *active = activated + i * stride;
      const float *dw_weight = m.dw_weight + (start + i) * 9;
      // Through the GELU: `grad` is then the gradient of the 3x3 convolution's output.
      for (int64_t column = s.row(top); column < s.row(top) + s.columns(bottom - top); column += kPanelColumns) {
        Vec sums[kBlockVectors];
        convolve_3x3(values + column - pitch - 1, pitch, dw_weight, m.dw_bias[start + i], sums);
        for (int j = 0; j < kBlockVectors; ++j) {
          float *at = grad + column + j * kLanes;
          Vec result;
          store(at, gelu_and_grad(sums[j], load(at), &result));
          store(active + column + j * kLanes, result);
        }
      }
      // The last panel may reach beyond the last row, and the products over pixels into the next one.
      s.clear_border(grad, s.from - 1, s.to + 1);
      std::fill(grad + s.row(s.to + 1), grad + stride, 0.0f);
      std::fill(active + interior + length, active + interior + length + kLanes, 0.0f);
      grads->dw_bias[start + i] += sum_of(grad + interior, length);
      correlate(s, values, grad, &grads->dw_weight[(start + i) * 9]);
    }
    add_dot_products({padded_dy + interior, stride}, channels, {activated + interior, stride}, count, length,
                     &grads->weight2[start], m.hidden);
    for (int64_t i = 0; i < count; ++i) {
      // Through the 3x3 convolution: in place of `activated`.
      float flipped[9], *result = activated + i * stride;
      for (int64_t t = 0; t < 9; ++t) flipped[t] = m.dw_weight[(start + i) * 9 + 8 - t];
      for (int64_t column = interior; column < interior + outputs; column += kPanelColumns) {
        Vec sums[kBlockVectors];
        convolve_3x3(dhidden + i * stride + column - pitch - 1, pitch, flipped, 0, sums);
        for (int j = 0; j < kBlockVectors; ++j) store(result + column + j * kLanes, sums[j]);
      }
      s.clear_border(result, s.from, s.to);
      std::fill(result + s.row(s.to), result + stride, 0.0f);
      grads->bias1[start + i] += sum_of(result + interior, length);
    }
    add_dot_products({activated + interior, stride}, count, {inputs + interior, stride}, channels, length,
                     &grads->weight1[start * channels], channels);
    multiply_strip(s, weight1_transposed, start / kHiddenBlock * padded_rows, channels, activated, count, s.from, s.to,
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
static FusedMlp fused_mlp_of(void **params, int64_t **shapes, bool for_gradients) {
  const auto input = [&](int i) { return static_cast<const float *>(params[i]); };
  const int64_t hidden = shapes[1][0], channels = shapes[0][1];
  const float *weight1 = input(1), *weight2 = input(5);
  const auto first = [=](int64_t row, int64_t k) { return weight1[row * channels + k]; };
  const auto second = [=](int64_t channel, int64_t column) { return weight2[channel * hidden + column]; };
  const auto second_transposed = [=](int64_t row, int64_t k) { return weight2[k * hidden + row]; };
  return {input(0), input(2), input(3), input(4), for_gradients ? nullptr : input(6), shapes[0][2], shapes[0][3],
          channels, hidden, PackedMatrix(hidden, channels, first),
          for_gradients ? PackedMatrix(hidden, channels, second_transposed, Slot::kPackedWeight2)
                        : pack_hidden_blocks(channels, hidden, Slot::kPackedWeight2, second)};
}

}  // namespace mindska

MINDSKA_OPERATOR(mindska_fused_mlp,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), dw_weight (N, 1, 3, 3), dw_bias (N), "
                 "weight2 (C, N, 1, 1), bias2 (C) -> y (B, C, H, W) where C <= 65536, N <= 65536") {
  using namespace mindska;
  const FusedMlp mlp = fused_mlp_of(params, shapes, false);
  float *y = static_cast<float *>(params[7]);
  mlp.forward(shapes[0][0], [&](int64_t first, int64_t channel, const float *pixels) {
    for (int64_t i = 0; i < mlp.width; ++i) y[first + i] = pixels[i] + mlp.bias2[channel];
  });
  return 0;
}

// y = shortcut + scale * mlp(x)
MINDSKA_OPERATOR(mindska_fused_mlp_residual,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), dw_weight (N, 1, 3, 3), dw_bias (N), "
                 "weight2 (C, N, 1, 1), bias2 (C), scale (C), shortcut (B, C, H, W) -> y (B, C, H, W) "
                 "where C <= 65536, N <= 65536") {
  using namespace mindska;
  const FusedMlp mlp = fused_mlp_of(params, shapes, false);
  const float *scale = static_cast<float *>(params[7]), *shortcut = static_cast<float *>(params[8]);
  float *y = static_cast<float *>(params[9]);
  mlp.forward(shapes[0][0], [&](int64_t first, int64_t channel, const float *pixels) {
    for (int64_t i = 0; i < mlp.width; ++i) {
      y[first + i] = shortcut[first + i] + scale[channel] * (pixels[i] + mlp.bias2[channel]);
    }
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_fused_mlp_grad,
                 "x (B, C, H, W), weight1 (N, C, 1, 1), bias1 (N), dw_weight (N, 1, 3, 3), dw_bias (N), "
                 "weight2 (C, N, 1, 1), dy (B, C, H, W) "
                 "-> dx (B, C, H, W), dweight1 (N, C, 1, 1), dbias1 (N), ddw_weight (N, 1, 3, 3), ddw_bias (N), "
                 "dweight2 (C, N, 1, 1), dbias2 (C) where C <= 65536, N <= 65536") {
  using namespace mindska;
  const FusedMlp mlp = fused_mlp_of(params, shapes, true);
  const float *dy = static_cast<float *>(params[6]), *weight1 = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[7]);
  const int64_t batch = shapes[0][0], image = mlp.channels * mlp.height * mlp.width, channels = mlp.channels;
  const PackedMatrix weight1_transposed =
      pack_hidden_blocks(channels, mlp.hidden, Slot::kPackedWeight1Transposed,
                         [=](int64_t channel, int64_t column) { return weight1[column * channels + channel]; });
  // Each image's own sums, strip by strip, then their sum in the order of the images: the same whatever the number of
  // threads.
  const int64_t count = mlp.strips(3 * channels + 3 * kHiddenBlock, 1);
  std::vector<MlpGradients> grads(batch, MlpGradients(channels, mlp.hidden));
  parallel_for(batch, kAlwaysParallel, [&](int64_t i) {
    for (int64_t strip = 0; strip < count; ++strip) {
      const Strip s{mlp.height, mlp.width, strip * mlp.height / count, (strip + 1) * mlp.height / count};
      backward_strip(mlp, weight1_transposed, s, mlp.x + i * image, dy + i * image, dx + i * image, &grads[i]);
    }
  });
  std::vector<float> MlpGradients::*parts[] = {&MlpGradients::weight1, &MlpGradients::bias1,   &MlpGradients::dw_weight,
                                               &MlpGradients::dw_bias, &MlpGradients::weight2, &MlpGradients::bias2};
  for (int part = 0; part < 6; ++part) {
    float *to = static_cast<float *>(params[8 + part]);
    const size_t size = (grads[0].*parts[part]).size();
    parallel_for(size, static_cast<int64_t>(size * grads.size()), [&](size_t j) {
      float total = 0;
      for (const MlpGradients &image_grads : grads) total += (image_grads.*parts[part])[j];
      to[j] = total;
    });
  }
  return 0;
}
