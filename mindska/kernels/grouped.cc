// Grouped convolution of a few channels a group, with stride 1, an odd square kernel and any dilation, padded so that the
// size stays; and its gradients.
//
// A group's planes are copied with a border of zeros. A padded plane is then one long row, in which the input of every
// tap (element of the kernel) lies at a fixed distance: the sums run over it without regard to the ends of rows, and
// what they give for the border is left out at the end.
#include "workspace.h"

namespace mindska {

#ifdef __AVX512F__
constexpr int kBlockOutputs = 4, kOutputVectors = 4;  // output channels, and vectors of a row, of a block in registers
#else
constexpr int kBlockOutputs = 3, kOutputVectors = 1;
#endif

struct Grouped {
  int64_t height, width, kernel_size, dilation;

  int64_t pad() const { return dilation * (kernel_size / 2); }
  int64_t pitch() const { return width + 2 * pad(); }
  int64_t plane() const { return height * width; }
  int64_t taps() const { return kernel_size * kernel_size; }
  // Of a row of outputs, in whole blocks; of a padded plane with what the last block may read beyond it.
  int64_t row() const {
    constexpr int64_t block = kOutputVectors * kLanes;
    return (height * pitch() + block - 1) / block * block;
  }
  int64_t padded() const { return row() + 2 * pad() * (pitch() + 1) + kLanes; }
  int64_t shift(int64_t tap) const { return dilation * (tap / kernel_size * pitch() + tap % kernel_size); }

  // Copies planes into padded ones: (planes, H, W) -> (planes, padded()).
  void pad_planes(const float *from, int64_t planes, float *to) const {
    std::fill(to, to + planes * padded(), 0.0f);
    for (int64_t i = 0; i < planes * height; ++i) {
      float *line = to + i / height * padded() + (i % height + pad()) * pitch() + pad();
      copy_row(from + i * width, line, width);
    }
  }

  // The other way, (planes, row()) -> (planes, H, W); adds the bias (planes,), where there is one, and takes the ReLU.
  void crop_planes(const float *from, int64_t planes, float *to, const float *bias, bool relu) const {
    for (int64_t i = 0; i < planes; ++i) {
      for (int64_t y = 0; y < height; ++y) {
        for_each_vector(width, [&](int64_t x, int count) {
          Vec value = load_some(from + i * row() + y * pitch() + x, count) + (bias ? bias[i] : 0);
          if (relu) value = value < Vec{} ? Vec{} : value;  // NaN stays NaN
          store_some(to + (i * height + y) * width + x, value, count);
        });
      }
    }
  }

  // outputs (count, row()) of padded inputs (depth, padded()). weight(output, input, tap) are the weights.
  template <typename Weight>
  void convolve(const float *inputs, int64_t depth, int64_t count, float *outputs, Weight weight) const {
    const Workspace packed(Slot::kPackedTaps, depth * taps() * kBlockOutputs);
    for (int64_t first = 0; first < count; first += kBlockOutputs) {
      float *to = packed.data();
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t tap = 0; tap < taps(); ++tap) {
          for (int64_t i = 0; i < kBlockOutputs; ++i) *to++ = first + i < count ? weight(first + i, k, tap) : 0;
        }
      }
      for (int64_t at = 0; at < row(); at += kOutputVectors * kLanes) {
        Vec sums[kBlockOutputs][kOutputVectors] = {};
        const float *w = packed.data();
        for (int64_t k = 0; k < depth; ++k) {
          for (int64_t tap = 0; tap < taps(); ++tap, w += kBlockOutputs) {
            const float *from = inputs + k * padded() + at + shift(tap);
            Vec values[kOutputVectors];
            for (int j = 0; j < kOutputVectors; ++j) values[j] = load(from + j * kLanes);
            for (int i = 0; i < kBlockOutputs; ++i) {
              const Vec factor = splat(w[i]);
              for (int j = 0; j < kOutputVectors; ++j) sums[i][j] += factor * values[j];
            }
          }
        }
        for (int64_t i = 0; i < kBlockOutputs && first + i < count; ++i) {
          for (int j = 0; j < kOutputVectors; ++j) store(outputs + (first + i) * row() + at + j * kLanes, sums[i][j]);
        }
      }
    }
  }

  // Adds to sums[(output * depth + input) * taps() + tap] the products of gradients, in rows like those of `inputs`,
  // with what the tap saw: the gradient of the weight. Three taps and kBlockOutputs gradients at once.
  void correlate(const float *gradients, int64_t count, const float *inputs, int64_t depth, Vec *sums) const {
    for (int64_t first = 0; first < count; first += kBlockOutputs) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t start = 0; start < taps(); start += 3) {
          const int64_t tap_count = std::min<int64_t>(3, taps() - start);
          Vec total[kBlockOutputs][3] = {};
          const float *from[3], *grads[kBlockOutputs];
          for (int64_t t = 0; t < 3; ++t) from[t] = inputs + k * padded() + shift(std::min(start + t, taps() - 1));
          for (int64_t i = 0; i < kBlockOutputs; ++i) grads[i] = gradients + std::min(first + i, count - 1) * row();
          for (int64_t at = 0; at < row(); at += kLanes) {
            const Vec seen[3] = {load(from[0] + at), load(from[1] + at), load(from[2] + at)};
            for (int i = 0; i < kBlockOutputs; ++i) {
              const Vec grad = load(grads[i] + at);
              for (int t = 0; t < 3; ++t) total[i][t] += grad * seen[t];
            }
          }
          for (int64_t i = 0; i < kBlockOutputs && first + i < count; ++i) {
            for (int64_t t = 0; t < tap_count; ++t) {
              sums[((first + i) * depth + k) * taps() + start + t] += total[i][t];
            }
          }
        }
      }
    }
  }
};

}  // namespace mindska

// y = convolution + bias, and ReLU of it where relu is 1
MINDSKA_OPERATOR(mindska_grouped,
                 "x (B, C, H, W), weight (O, D, K, K), bias (O), options {dilation, relu} -> y (B, O, H, W) "
                 "where C % D == 0, O % (C / D) == 0, K % 2 == 1, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], channels = shapes[0][1], outputs = shapes[1][0], depth = shapes[1][1];
  const int64_t groups = channels / depth, count = outputs / groups;
  const float *x = static_cast<float *>(params[0]), *weight = static_cast<float *>(params[1]);
  const float *bias = static_cast<float *>(params[2]);
  float *y = static_cast<float *>(params[4]);
  const int32_t *options = static_cast<int32_t *>(params[3]);
  const Grouped g{shapes[0][2], shapes[0][3], shapes[1][2], options[0]};
  parallel_for(batch * groups, kAlwaysParallel, [&](int64_t task) {
    const int64_t group = task % groups;
    const float *w = weight + group * count * depth * g.taps();
    const Workspace inputs(Slot::kPaddedInput, depth * g.padded()), results(Slot::kAccumulator, count * g.row());
    g.pad_planes(x + task * depth * g.plane(), depth, inputs.data());
    g.convolve(inputs.data(), depth, count, results.data(),
               [&](int64_t i, int64_t k, int64_t tap) { return w[(i * depth + k) * g.taps() + tap]; });
    g.crop_planes(results.data(), count, y + task * count * g.plane(), bias + group * count, options[1]);
  });
  return 0;
}

// dy: the gradient of the ReLU's input.
MINDSKA_OPERATOR(mindska_grouped_grad,
                 "x (B, C, H, W), weight (O, D, K, K), options {dilation, relu}, dy (B, O, H, W) "
                 "-> dx (B, C, H, W), dweight (O, D, K, K), dbias (O) "
                 "where C % D == 0, O % (C / D) == 0, K % 2 == 1, dilation >= 1, dilation * K <= 4096") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], channels = shapes[0][1], outputs = shapes[1][0], depth = shapes[1][1];
  const int64_t groups = channels / depth, count = outputs / groups;
  const float *x = static_cast<float *>(params[0]), *weight = static_cast<float *>(params[1]);
  const float *dy = static_cast<float *>(params[3]);
  float *dx = static_cast<float *>(params[4]), *dweight = static_cast<float *>(params[5]);
  float *dbias = static_cast<float *>(params[6]);
  const Grouped g{shapes[0][2], shapes[0][3], shapes[1][2], *static_cast<int32_t *>(params[2])};
  parallel_for(groups, kAlwaysParallel, [&](int64_t group) {
    const float *w = weight + group * count * depth * g.taps();
    const Workspace inputs(Slot::kPaddedInput, depth * g.padded());
    const Workspace gradients(Slot::kPaddedGradient, count * g.padded());
    const Workspace accumulator(Slot::kAccumulator, std::max(count, depth) * g.row());
    float *results = accumulator.data();
    std::vector<Vec> sums(count * depth * g.taps());
    std::fill(dbias + group * count, dbias + (group + 1) * count, 0.0f);
    for (int64_t image = 0; image < batch; ++image) {
      const int64_t task = image * groups + group;
      const float *dy_group = dy + task * count * g.plane();
      g.pad_planes(x + task * depth * g.plane(), depth, inputs.data());
      g.pad_planes(dy_group, count, gradients.data());
      g.convolve(gradients.data(), count, depth, results, [&](int64_t k, int64_t i, int64_t tap) {
        return w[(i * depth + k) * g.taps() + g.taps() - 1 - tap];
      });
      g.crop_planes(results, depth, dx + task * depth * g.plane(), nullptr, false);
      // In rows as long as the padded inputs', with zeros between them.
      std::fill(results, results + count * g.row(), 0.0f);
      for (int64_t i = 0; i < count * g.height; ++i) {
        std::memcpy(results + i / g.height * g.row() + i % g.height * g.pitch(), dy_group + i * g.width,
                    g.width * sizeof(float));
      }
      g.correlate(results, count, inputs.data(), depth, sums.data());
      for (int64_t i = 0; i < count; ++i) dbias[group * count + i] += sum_of(dy_group + i * g.plane(), g.plane());
    }
    for (size_t i = 0; i < sums.size(); ++i) dweight[group * sums.size() + i] = sum(sums[i]);
  });
  return 0;
}
