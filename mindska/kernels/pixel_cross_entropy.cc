// The cross-entropy of each pixel for logits that are enlarged (bilinear) to the labels' size; and its gradient.
//
// The enlarged logits, 150 maps as large as the image for ADE20K, are never in memory: each row of them is made when it
// is needed, again for the gradient. A pixel's classes lie side by side, in whole vectors. A task has some rows of the
// logits and the pixels that lie between these and the next ones; the gradient for the row after its last is added to
// that row in the end.
#include "shuffle.h"
#include "workspace.h"

namespace mindska {

constexpr int64_t kTaskRows = 8;
constexpr float kNoClass = -3e38f;  // a logit whose exponential is 0

// Where the pixels of an axis lie among those of the logits, as PyTorch computes it: between `first` and `second`, with
// `weight` for the second.
struct Axis {
  std::vector<int64_t> first, second;
  std::vector<float> weight;

  Axis(int64_t size, int64_t enlarged, int64_t used, bool align_corners) {
    const int64_t steps = enlarged > 1 ? enlarged - 1 : 1;
    const float scale = align_corners ? static_cast<float>(size - 1) / static_cast<float>(steps)
                                      : static_cast<float>(size) / static_cast<float>(enlarged);
    for (int64_t i = 0; i < used; ++i) {
      const float at = align_corners ? scale * static_cast<float>(i)
                                     : std::max(0.0f, scale * (static_cast<float>(i) + 0.5f) - 0.5f);
      first.push_back(std::min(static_cast<int64_t>(at), size - 1));
      second.push_back(std::min(first.back() + 1, size - 1));
      weight.push_back(at - static_cast<float>(first.back()));
    }
  }
};

// The rows [first, last) of the logits that a task has, and the pixels' rows [begin, end).
struct TaskRows {
  int64_t image, first, last, begin, end;
};

struct PixelCrossEntropy {
  int64_t batch, classes, height, width, rows, columns;
  const float *logits;
  const int32_t *labels;
  int32_t ignored;
  Axis vertical, horizontal;

  PixelCrossEntropy(const int64_t *shape, const int64_t *labels_shape, void **params)
      : batch(shape[0]), classes(shape[1]), height(shape[2]), width(shape[3]), rows(labels_shape[1]),
        columns(labels_shape[2]), logits(static_cast<float *>(params[0])), labels(static_cast<int32_t *>(params[1])),
        ignored(static_cast<int32_t *>(params[3])[1]),
        vertical(height, checked(params, 0, rows), rows, static_cast<int32_t *>(params[3])[0]),
        horizontal(width, checked(params, 1, columns), columns, static_cast<int32_t *>(params[3])[0]) {}

  static int64_t checked(void **params, int axis, int64_t labels) {
    const int64_t overhang = static_cast<int32_t *>(params[2])[axis];
    if (overhang < 0) throw Refused("the enlarged logits are smaller than the labels", kWrongValue);
    return labels + overhang;
  }

  int64_t padded_classes() const { return (classes + kLanes - 1) / kLanes * kLanes; }
  int64_t row_size() const { return width * padded_classes(); }
  int64_t tasks_of_image() const { return (height + kTaskRows - 1) / kTaskRows; }
  int64_t tasks() const { return batch * tasks_of_image(); }

  TaskRows task(int64_t index) const {
    const int64_t first = index % tasks_of_image() * kTaskRows, last = std::min(first + kTaskRows, height);
    const auto begin_of = [&](int64_t row) {
      return std::lower_bound(vertical.first.begin(), vertical.first.end(), row) - vertical.first.begin();
    };
    return {index / tasks_of_image(), first, last, begin_of(first), begin_of(last)};
  }

  // A row of the logits, the classes side by side: (width, padded_classes()).
  void load_row(int64_t image, int64_t row, float *to) const {
    for (int64_t k = 0; k < classes; k += kLanes) {
      for (int64_t x = 0; x < width; x += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, width - x));
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float *from = logits + ((image * classes + k + i) * height + row) * width + x;
          block[i] = k + i < classes ? load_some(from, count) : splat(kNoClass);
        }
        transpose(block);
        for (int i = 0; i < count; ++i) store(to + (x + i) * padded_classes() + k, block[i]);
      }
    }
  }

  // The other way: stores a row of dlogits, or adds to it.
  void store_row(const float *from, int64_t image, int64_t row, bool adds, float *dlogits) const {
    for (int64_t k = 0; k < classes; k += kLanes) {
      for (int64_t x = 0; x < width; x += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, width - x));
        Vec block[kLanes] = {};
        for (int i = 0; i < count; ++i) block[i] = load(from + (x + i) * padded_classes() + k);
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, classes - k); ++i) {
          float *to = dlogits + ((image * classes + k + i) * height + row) * width + x;
          store_some(to, adds ? load_some(to, count) + block[i] : block[i], count);
        }
      }
    }
  }

  // function(x, index, label, pixel, of_label, total) for the pixels of a task that count: `pixel` has the exponentials
  // of its logits less the largest, `total` is their sum, and `of_label` the label's logit less the largest. A label
  // that no class has is -1, and `of_label` NaN. end_row(y) follows each row.
  template <typename Function, typename EndRow>
  void for_each_pixel(const TaskRows &task, float *buffer, Function function, EndRow end_row) const {
    float *upper = buffer, *lower = upper + row_size(), *mixed = lower + row_size(), *pixel = mixed + row_size();
    const int64_t padded = padded_classes();
    int64_t loaded_upper = -1, loaded_lower = -1;
    for (int64_t y = task.begin; y < task.end; ++y) {
      if (vertical.first[y] == loaded_lower) std::swap(upper, lower), std::swap(loaded_upper, loaded_lower);
      if (vertical.first[y] != loaded_upper) load_row(task.image, loaded_upper = vertical.first[y], upper);
      if (vertical.second[y] != loaded_lower) load_row(task.image, loaded_lower = vertical.second[y], lower);
      const float below = vertical.weight[y], above = 1 - below;
      for (int64_t i = 0; i < row_size(); i += kLanes) {
        store(mixed + i, above * load(upper + i) + below * load(lower + i));
      }
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t index = (task.image * rows + y) * columns + x;
        const int32_t label = labels[index];
        if (label == ignored) continue;
        const float *a = mixed + horizontal.first[x] * padded, *b = mixed + horizontal.second[x] * padded;
        const float right = horizontal.weight[x], left = 1 - right;
        Vec largest = splat(kNoClass);
        for (int64_t k = 0; k < padded; k += kLanes) {
          const Vec value = left * load(a + k) + right * load(b + k);
          store(pixel + k, value);
          largest = value > largest ? value : largest;
        }
        float maximum = largest[0];
        for (int i = 1; i < kLanes; ++i) maximum = std::max(maximum, largest[i]);
        const bool exists = label >= 0 && label < classes;
        const float of_label = exists ? pixel[label] - maximum : NAN;
        Vec total = {};
        for (int64_t k = 0; k < padded; k += kLanes) {
          const Vec exponential = exp_negative(load(pixel + k) - maximum);
          store(pixel + k, exponential);
          total += exponential;
        }
        function(x, index, exists ? label : -1, pixel, of_label, sum(total));
      }
      end_row(y);
    }
  }

  int64_t buffer_size() const { return 3 * row_size() + padded_classes(); }
};

}  // namespace mindska

// The loss of each pixel; 0 where its label is `ignored`, NaN where no class has its number. `overhang`: rows and
// columns that the enlarged logits have beyond the labels'.
MINDSKA_OPERATOR(mindska_pixel_cross_entropy,
                 "logits (B, K, h, w), labels (B, H, W) int32, overhang (2) int32, options {align_corners, ignored} "
                 "-> losses (B, H, W)") {
  using namespace mindska;
  const PixelCrossEntropy p(shapes[0], shapes[1], params);
  float *losses = static_cast<float *>(params[4]);
  parallel_for(p.tasks(), kAlwaysParallel, [&](int64_t index) {
    const TaskRows task = p.task(index);
    const Workspace buffer(Slot::kClassRows, p.buffer_size());
    std::fill(losses + (task.image * p.rows + task.begin) * p.columns,
              losses + (task.image * p.rows + task.end) * p.columns, 0.0f);
    p.for_each_pixel(task, buffer.data(),
                     [&](int64_t, int64_t i, int32_t, const float *, float of_label, float total) {
                       losses[i] = std::log(total) - of_label;
                     },
                     [](int64_t) {});
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_pixel_cross_entropy_grad,
                 "logits (B, K, h, w), labels (B, H, W) int32, overhang (2) int32, options {align_corners, ignored}, "
                 "dlosses (B, H, W) -> dlogits (B, K, h, w)") {
  using namespace mindska;
  const PixelCrossEntropy p(shapes[0], shapes[1], params);
  const float *dlosses = static_cast<float *>(params[4]);
  float *dlogits = static_cast<float *>(params[5]);
  const int64_t padded = p.padded_classes(), size = p.row_size();
  const Workspace spilled(Slot::kSpilledRows, p.tasks() * size);
  float *spill = spilled.data();
  parallel_for(p.tasks(), kAlwaysParallel, [&](int64_t index) {
    const TaskRows task = p.task(index);
    const Workspace buffer(Slot::kClassRows, p.buffer_size() + size);
    const Workspace accumulator(Slot::kAccumulator, (kTaskRows + 1) * size);
    float *row_gradient = buffer.data() + p.buffer_size(), *gradients = accumulator.data();
    std::fill(gradients, gradients + (kTaskRows + 1) * size, 0.0f);
    std::fill(row_gradient, row_gradient + size, 0.0f);
    p.for_each_pixel(
        task, buffer.data(),
        [&](int64_t x, int64_t i, int32_t label, float *pixel, float of_label, float total) {
          const float dloss = label < 0 ? of_label : dlosses[i], factor = dloss / total;
          for (int64_t k = 0; k < padded; k += kLanes) store(pixel + k, factor * load(pixel + k));
          if (label >= 0) pixel[label] -= dloss;
          const float right = p.horizontal.weight[x], left = 1 - right;
          float *a = row_gradient + p.horizontal.first[x] * padded, *b = row_gradient + p.horizontal.second[x] * padded;
          for (int64_t k = 0; k < padded; k += kLanes) {
            const Vec value = load(pixel + k);
            store(a + k, load(a + k) + left * value);
            store(b + k, load(b + k) + right * value);
          }
        },
        [&](int64_t y) {
          float *above = gradients + (p.vertical.first[y] - task.first) * size;
          float *below = gradients + (p.vertical.second[y] - task.first) * size;
          const float weight = p.vertical.weight[y];
          for (int64_t k = 0; k < size; k += kLanes) {
            const Vec value = load(row_gradient + k);
            store(above + k, load(above + k) + (1 - weight) * value);
            store(below + k, load(below + k) + weight * value);
            store(row_gradient + k, Vec{});
          }
        });
    for (int64_t row = task.first; row < task.last; ++row) {
      p.store_row(gradients + (row - task.first) * size, task.image, row, false, dlogits);
    }
    std::memcpy(spill + index * size, gradients + (task.last - task.first) * size, size * sizeof(float));
  });
  parallel_for(p.tasks(), kAlwaysParallel, [&](int64_t index) {
    const TaskRows task = p.task(index);
    if (task.first > 0) p.store_row(spill + (index - 1) * size, task.image, task.first, true, dlogits);
  });
  return 0;
}
