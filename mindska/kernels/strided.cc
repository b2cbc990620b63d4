// Convolution with a stride and an odd square kernel, padded so that the size is divided by the stride; and its gradients.
//
// The input is split into phases (as in polyphase filters): each channel's pixels are sorted by their row and column
// modulo the stride into planes with a border of zeros. What a tap (element of the kernel) sees is then one plane,
// shifted: a row of the im2col matrix, which need not be written out. The convolution is a product of matrices as for
// 1x1 kernels. Rows of a plane are longer than rows of the output: columns at their ends belong nowhere. The gradient of
// the input is such a product as well, another one for each phase.
#include "activation.h"
#include "matrix.h"

namespace mindska {

// The im2col matrix of a convolution, as `multiply` reads it: row k is a shifted plane of (B, planes, rows, pitch), from
// offsets[k] on.
struct Im2col {
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
static inline void copy_strided(int64_t stride, int64_t count, const float *from, float *to) {
  const auto run = [=](auto stride) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  };
  switch (stride) {
    case 2: return run(std::integral_constant<int64_t, 2>());
    case 4: return run(std::integral_constant<int64_t, 4>());
    default: return run(stride);
  }
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct StridedConvolution {
  int64_t batch, channels, height, width, outputs, kernel_size, stride, dilation, pad;
  int64_t out_height, out_width, rows, pitch;  // of the output, and of a plane
  std::vector<int64_t> phases;       // that taps see, by their first row or column
  std::vector<int64_t> phase_index;  // of a tap's row or column, among `phases`

  StridedConvolution(const int64_t *x, const int64_t *weight, const void *options)
      : batch(x[0]), channels(x[1]), height(x[2]), width(x[3]), outputs(weight[0]), kernel_size(weight[2]),
        stride(static_cast<const int32_t *>(options)[0]), dilation(static_cast<const int32_t *>(options)[1]),
        pad(dilation * (kernel_size / 2)), out_height(ceil_div(height, stride)), out_width(ceil_div(width, stride)),
        rows(ceil_div(height + 2 * pad, stride)), pitch(ceil_div(width + 2 * pad, stride)) {
    for (int64_t tap = 0; tap < kernel_size; ++tap) {
      const int64_t start = tap * dilation % stride;
      const auto found = std::find(phases.begin(), phases.end(), start);
      phase_index.push_back(found - phases.begin());
      if (found == phases.end()) phases.push_back(start);
    }
  }

  int64_t taps() const { return kernel_size * kernel_size; }
  int64_t depth() const { return channels * taps(); }
  int64_t planes() const { return static_cast<int64_t>(phases.size() * phases.size()); }
  int64_t step() const { return channels * planes() * rows * pitch; }

  // The phases of all images: (B, C, planes, rows, pitch), and zeros after them: what is read there belongs nowhere, but
  // is multiplied with zeros in the gradient of the weight, where NaN would not vanish.
  Workspace phase_planes(const float *x) const {
    const int64_t tail = kernel_size * dilation * (pitch + 1) + kLanes;
    Workspace workspace(Slot::kPhasePlanes, batch * step() + tail);
    float *all = workspace.data();
    std::fill(all + batch * step(), all + batch * step() + tail, 0.0f);
    parallel_for(batch * channels, batch * step(), [&](int64_t map) {
      float *to = all + map * planes() * rows * pitch;
      for (const int64_t top : phases) {
        for (const int64_t left : phases) {
          const int64_t left_border = std::max<int64_t>(ceil_div(pad - left, stride), 0);  // columns of the border
          const int64_t count = ceil_div(width - (left_border * stride + left - pad), stride);
          for (int64_t row = 0; row < rows; ++row, to += pitch) {
            const int64_t y = row * stride + top - pad;
            std::fill(to, to + pitch, 0.0f);
            if (y < 0 || y >= height || count <= 0) continue;
            const float *from = x + (map * height + y) * width + left_border * stride + left - pad;
            copy_strided(stride, count, from, to + left_border);
          }
        }
      }
    });
    return workspace;
  }

  Im2col im2col_of(const Workspace &phase_planes) const {
    std::vector<int64_t> offsets;
    for (int64_t k = 0; k < depth(); ++k) {
      const int64_t y = k % taps() / kernel_size, x = k % kernel_size;
      const int64_t phase = phase_index[y] * static_cast<int64_t>(phases.size()) + phase_index[x];
      const int64_t plane = k / taps() * planes() + phase;
      offsets.push_back((plane * rows + y * dilation / stride) * pitch + x * dilation / stride);
    }
    return {phase_planes.data(), batch, step(), out_height * pitch, pitch, out_width, out_width, 1, 0, std::move(offsets)};
  }

  // dy in rows of another length, after `left_border` zeros, and `above` rows of zeros above and below.
  Workspace padded_gradient(const float *dy, int64_t above, int64_t left_border, int64_t length) const {
    const int64_t plane = (out_height + 2 * above) * length, maps = batch * outputs;
    Workspace workspace(Slot::kPaddedGradient, maps * plane + length + kLanes);
    float *all = workspace.data();
    parallel_for(maps, maps * plane, [&](int64_t map) {
      float *to = all + map * plane;
      std::fill(to, to + plane, 0.0f);
      for (int64_t y = 0; y < out_height; ++y) {
        const float *from = dy + (map * out_height + y) * out_width;
        std::memcpy(to + (y + above) * length + left_border, from, out_width * sizeof(float));
      }
    });
    return workspace;
  }

  // Writes to dx the pixels of a phase: their rows and columns are `top` and `left` modulo the stride. dy: padded by
  // `margin` zeros all around.
  void input_gradient(const float *weight, const float *dy, int64_t margin, const FeatureMaps &dx, int64_t top,
                      int64_t left) const {
    const int64_t length = out_width + 2 * margin, plane = (out_height + 2 * margin) * length;
    std::vector<int64_t> phase_taps, shifts, offsets;  // the taps that meet the phase, and where dy is then
    for (int64_t tap = 0; tap < taps(); ++tap) {
      const int64_t y = top + pad - tap / kernel_size * dilation, x = left + pad - tap % kernel_size * dilation;
      if (y % stride || x % stride) continue;
      phase_taps.push_back(tap);
      shifts.push_back((margin + y / stride) * length + margin + x / stride);
    }
    const int64_t count = static_cast<int64_t>(phase_taps.size());
    const PackedMatrix packed(channels, outputs * count, [&](int64_t channel, int64_t k) {
      return weight[(k / count * channels + channel) * taps() + phase_taps[k % count]];
    });
    for (int64_t k = 0; k < outputs * count; ++k) offsets.push_back(k / count * plane + shifts[k % count]);
    const int64_t high = ceil_div(height - top, stride), wide = ceil_div(width - left, stride);
    const Im2col im2col{dy, batch, outputs * plane, high * length, length, wide, width, stride, top * width + left,
                        std::move(offsets)};
    if (high <= 0 || wide <= 0) return;
    multiply(packed, im2col, [&](const Columns &columns, int64_t channel, int vector, Vec value) {
      columns.store_vector(dx, channel, vector, value);
    });
  }
};

}  // namespace mindska

// y = convolution + bias, and ReLU of it where relu is 1; in groups of D input channels.
MINDSKA_OPERATOR(mindska_strided,
                 "x (B, C, H, W), weight (O, D, K, K), bias (O), options {stride, dilation, relu} "
                 "-> y (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) where C % D == 0, O % (C / D) == 0, "
                 "K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[3]);
  const float *weight = static_cast<float *>(params[1]), *bias = static_cast<float *>(params[2]);
  const bool with_relu = static_cast<int32_t *>(params[3])[2];
  const FeatureMaps y(params[4], shapes[4]);
  const int64_t depth = shapes[1][1] * c.taps(), groups = c.channels / shapes[1][1], outputs = c.outputs / groups;
  const RowMatrix all{c.outputs, depth, weight};
  const Workspace phase_planes = c.phase_planes(static_cast<float *>(params[0]));
  const Im2col whole = c.im2col_of(phase_planes);
  const Tiles tiles(outputs, whole.columns());
  parallel(groups * tiles.tasks(), all.work(tiles.columns), [&](Tasks &tasks) {
    const Workspace columns_of_tile(Slot::kPackedColumns, depth * kTileColumns);
    Im2col im2col = whole;
    for (const int64_t task : tasks) {
      const int64_t group = task / tiles.tasks(), first = group * outputs;
      im2col.data = whole.data + group * (c.step() / groups);
      multiply_tile(all.part(first, outputs), im2col, tiles, task % tiles.tasks(), columns_of_tile.data(),
                    [&](const Columns &columns, int64_t row, int vector, Vec value) {
                      value += bias[first + row];
                      if (with_relu) value = relu(value);
                      columns.store_vector(y, first + row, vector, value);
                    });
    }
  });
  return 0;
}

// dy: the gradient of the ReLU's input.
MINDSKA_OPERATOR(mindska_strided_input_grad,
                 "x (B, C, H, W), weight (O, C, K, K), options {stride, dilation, relu}, "
                 "dy (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) -> dx (B, C, H, W) "
                 "where K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[2]);
  const int64_t margin = (c.stride - 1 + c.pad) / c.stride;
  const Workspace dy = c.padded_gradient(static_cast<float *>(params[3]), margin, margin, c.out_width + 2 * margin);
  for (int64_t phase = 0; phase < c.stride * c.stride; ++phase) {
    const FeatureMaps dx(params[4], shapes[0]);
    c.input_gradient(static_cast<float *>(params[1]), dy.data(), margin, dx, phase / c.stride, phase % c.stride);
  }
  return 0;
}

// dy: the gradient of the ReLU's input.
MINDSKA_OPERATOR(mindska_strided_weight_grad,
                 "x (B, C, H, W), weight (O, C, K, K), options {stride, dilation, relu}, "
                 "dy (B, O, (H + stride - 1) / stride, (W + stride - 1) / stride) -> dweight (O, C, K, K), dbias (O) "
                 "where K % 2 == 1, stride >= 1, stride <= 64, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const StridedConvolution c(shapes[0], shapes[1], params[2]);
  const Workspace phase_planes = c.phase_planes(static_cast<float *>(params[0]));
  const Im2col im2col = c.im2col_of(phase_planes);
  const int64_t shape[] = {c.batch, c.outputs, c.out_height, c.pitch};
  const Workspace padded = c.padded_gradient(static_cast<float *>(params[3]), 0, 0, c.pitch);
  const FeatureMaps dy(padded.data(), shape);
  float *dweight = static_cast<float *>(params[4]), *dbias = static_cast<float *>(params[5]);
  const TransposedProduct product(c.outputs, c.depth());
  parallel_for(product.tasks(), kAlwaysParallel, [&](int64_t task) { product.compute(task, dy, im2col, dweight, dbias); });
  return 0;
}
