// Convolution with a stride and an odd square kernel, padded so that the size is divided by the stride; and its gradients.
//
// Each channel's pixels are sorted by their row and column modulo the stride into planes with a border of zeros. What a tap
// sees is then one plane, shifted: a row of a matrix whose columns lie side by side, and the convolution a product of
// matrices as for 1x1 kernels. Rows of a plane are longer than rows of the output: columns at their ends belong nowhere.
// The gradient of the input is such a product as well, another one for each of the planes.
#include "matrix.h"

namespace mindska {

// Rows of a product's right side: rows of planes (B, C, plane), each from an offset on.
struct Patches {
  const float *data;
  int64_t batch, step_, pixels, pitch, width;  // results lie in the first `width` of `pitch` columns,
  int64_t map_width, stride, first;            // at first + (y * map_width + x) * stride in their map
  std::vector<int64_t> offsets;

  int64_t columns() const { return batch * pixels; }
  int64_t step() const { return step_; }
  const float *row(int64_t k) const { return data + offsets[k]; }
  int64_t target(int64_t pixel) const {
    const int64_t y = pixel / pitch, x = pixel % pitch;
    return x < width ? first + (y * map_width + x) * stride : -1;
  }
};

// to[i] = from[i * stride]
static inline void every(int64_t stride, int64_t count, const float *from, float *to) {
  const auto run = [=](auto stride) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  };
  switch (stride) {
    case 2: return run(std::integral_constant<int64_t, 2>());
    case 4: return run(std::integral_constant<int64_t, 4>());
    default: return run(stride);
  }
}

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct StridedConvolution {
  int64_t batch, channels, height, width, outputs, side, stride, dilation, pad;
  int64_t out_height, out_width, rows, pitch;  // of the output, and of a plane
  std::vector<int64_t> places;                 // of a tap's plane among those of its channel, in either direction
  std::vector<int64_t> starts;                 // the planes that taps see: their first row or column

  StridedConvolution(const int64_t *x, const int64_t *weight, const void *options)
      : batch(x[0]), channels(x[1]), height(x[2]), width(x[3]), outputs(weight[0]), side(weight[2]),
        stride(static_cast<const int32_t *>(options)[0]), dilation(static_cast<const int32_t *>(options)[1]),
        pad(dilation * (side / 2)), out_height(divided_up(height, stride)), out_width(divided_up(width, stride)),
        rows(divided_up(height + 2 * pad, stride)), pitch(divided_up(width + 2 * pad, stride)) {
    for (int64_t tap = 0; tap < side; ++tap) {
      const int64_t start = tap * dilation % stride;
      const auto found = std::find(starts.begin(), starts.end(), start);
      places.push_back(found - starts.begin());
      if (found == starts.end()) starts.push_back(start);
    }
  }

  int64_t taps() const { return side * side; }
  int64_t depth() const { return channels * taps(); }
  int64_t planes() const { return static_cast<int64_t>(starts.size() * starts.size()); }
  int64_t step() const { return channels * planes() * rows * pitch; }

  // The planes of all images: (B, C, planes, rows, pitch), and zeros behind them: what is read there belongs nowhere, but
  // is multiplied with zeros in the gradient of the weights, where NaN would not vanish.
  const float *sorted(const float *x) const {
    const int64_t behind = side * dilation * (pitch + 1) + kLanes;
    float *all = scratch(kBefore, batch * step() + behind);
    std::fill(all + batch * step(), all + batch * step() + behind, 0.0f);
#pragma omp parallel for schedule(static) if (batch * step() > kAlone)
    for (int64_t map = 0; map < batch * channels; ++map) {
      float *to = all + map * planes() * rows * pitch;
      for (const int64_t top : starts) {
        for (const int64_t left : starts) {
          const int64_t before = std::max<int64_t>(divided_up(pad - left, stride), 0);  // columns of the border
          const int64_t count = divided_up(width - (before * stride + left - pad), stride);
          for (int64_t row = 0; row < rows; ++row, to += pitch) {
            const int64_t y = row * stride + top - pad;
            std::fill(to, to + pitch, 0.0f);
            if (y < 0 || y >= height || count <= 0) continue;
            every(stride, count, x + (map * height + y) * width + before * stride + left - pad, to + before);
          }
        }
      }
    }
    return all;
  }

  // What the outputs see.
  Patches seen(const float *sorted) const {
    std::vector<int64_t> offsets;
    for (int64_t k = 0; k < depth(); ++k) {
      const int64_t y = k % taps() / side, x = k % side;
      const int64_t plane = k / taps() * planes() + places[y] * static_cast<int64_t>(starts.size()) + places[x];
      offsets.push_back((plane * rows + y * dilation / stride) * pitch + x * dilation / stride);
    }
    return {sorted, batch, step(), out_height * pitch, pitch, out_width, out_width, 1, 0, std::move(offsets)};
  }

  // dy in rows of another length, and rows of zeros above and below.
  const float *widened(const float *dy, int64_t above, int64_t before, int64_t length) const {
    const int64_t plane = (out_height + 2 * above) * length, maps = batch * outputs;
    float *all = scratch(kAfter, maps * plane + length + kLanes);
#pragma omp parallel for schedule(static) if (maps * plane > kAlone)
    for (int64_t map = 0; map < maps; ++map) {
      float *to = all + map * plane;
      std::fill(to, to + plane, 0.0f);
      for (int64_t y = 0; y < out_height; ++y) {
        std::memcpy(to + (y + above) * length + before, dy + (map * out_height + y) * out_width, out_width * sizeof(float));
      }
    }
    return all;
  }

  // Writes to dx the pixels whose rows and columns are `top` and `left` modulo the stride. `margin`: zeros around
  // the maps of dy.
  void input_gradient(const float *weight, const float *dy, int64_t margin, const Maps &dx, int64_t top,
                      int64_t left) const {
    const int64_t length = out_width + 2 * margin, plane = (out_height + 2 * margin) * length;
    std::vector<int64_t> taps_here, shifts, offsets;
    for (int64_t tap = 0; tap < taps(); ++tap) {
      const int64_t y = top + pad - tap / side * dilation, x = left + pad - tap % side * dilation;
      if (y % stride || x % stride) continue;
      taps_here.push_back(tap);
      shifts.push_back((margin + y / stride) * length + margin + x / stride);
    }
    const int64_t count = static_cast<int64_t>(taps_here.size());
    const Weights weights(channels, outputs * count, [&](int64_t channel, int64_t k) {
      return weight[(k / count * channels + channel) * taps() + taps_here[k % count]];
    });
    for (int64_t k = 0; k < outputs * count; ++k) offsets.push_back(k / count * plane + shifts[k % count]);
    const int64_t high = divided_up(height - top, stride), wide = divided_up(width - left, stride);
    const Patches patches{dy, batch, outputs * plane, high * length, length, wide, width, stride,
                          top * width + left, std::move(offsets)};
    if (high <= 0 || wide <= 0) return;
#pragma omp parallel if (weights.worth(patches.columns()))
    multiply(weights, patches, [&](const Columns &columns, int64_t channel, int vector, Vec value) {
      columns.store_vector(dx, channel, vector, value);
    });
  }
};

}  // namespace mindska

// relu: 1 for a ReLU.
MINDSKA_OPERATOR(mindska_strided,
                 "x (B, C, H, W), weight (O, C, K, K), bias (O), options {stride, dilation, relu} "
                 "-> y (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) "
                 "where K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[3]);
  const float *weight = static_cast<float *>(params[1]), *bias = static_cast<float *>(params[2]);
  const bool relu = static_cast<int32_t *>(params[3])[2];
  const Maps y(params[4], shapes[4]);
  const Weights weights(c.outputs, c.depth(), [&](int64_t row, int64_t k) { return weight[row * c.depth() + k]; });
  const Patches patches = c.seen(c.sorted(static_cast<float *>(params[0])));
#pragma omp parallel if (weights.worth(patches.columns()))
  multiply(weights, patches, [&](const Columns &columns, int64_t row, int vector, Vec value) {
    value += bias[row];
    if (relu) value = value < Vec{} ? Vec{} : value;  // NaN stays NaN
    columns.store_vector(y, row, vector, value);
  });
  return 0;
}

// dy: behind the ReLU.
MINDSKA_OPERATOR(mindska_strided_input_grad,
                 "x (B, C, H, W), weight (O, C, K, K), options {stride, dilation, relu}, "
                 "dy (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) -> dx (B, C, H, W) "
                 "where K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[2]);
  const int64_t margin = (c.stride - 1 + c.pad) / c.stride;
  const float *dy = c.widened(static_cast<float *>(params[3]), margin, margin, c.out_width + 2 * margin);
  for (int64_t phase = 0; phase < c.stride * c.stride; ++phase) {
    const Maps dx(params[4], shapes[0]);
    c.input_gradient(static_cast<float *>(params[1]), dy, margin, dx, phase / c.stride, phase % c.stride);
  }
  return 0;
}

// dy: behind the ReLU.
MINDSKA_OPERATOR(mindska_strided_weight_grad,
                 "x (B, C, H, W), weight (O, C, K, K), options {stride, dilation, relu}, "
                 "dy (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) -> dweight (O, C, K, K), dbias (O) "
                 "where K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[2]);
  const Patches patches = c.seen(c.sorted(static_cast<float *>(params[0])));
  const int64_t shape[] = {c.batch, c.outputs, c.out_height, c.pitch};
  const Maps dy(c.widened(static_cast<float *>(params[3]), 0, 0, c.pitch), shape);
  float *dweight = static_cast<float *>(params[4]), *dbias = static_cast<float *>(params[5]);
#pragma omp parallel
  multiply_turned(dy, c.outputs, patches, c.depth(), dweight, dbias);
  return 0;
}
