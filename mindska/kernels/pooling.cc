// Pooling: the largest or the mean value of windows of a feature map, or of the whole map. For inference.
#include "simd.h"

namespace mindska {

// function(plane) for B * C planes, by all threads.
template <typename Function>
static void parallel_for_each_map(const int64_t *shape, Function function) {
  parallel_for(shape[0] * shape[1], element_count(shape, 4), [&](int64_t plane) { function(plane); });
}

static inline float maximum(float a, float b) { return b > a || b != b ? b : a; }  // NaN stays
static inline Vec maximum(Vec a, Vec b) { return a >= b || a != a ? a : b; }

}  // namespace mindska

// The largest of 3x3 elements, with stride 2; the first windows begin `top` rows above and `left` columns before the map,
// and what lies outside of it does not count.
MINDSKA_OPERATOR(mindska_max_pool,
                 "x (B, C, H, W), options {top, left, high, wide} -> y (B, C, high, wide) "
                 "where top >= 0, top <= 2, left >= 0, left <= 2, high >= 1, wide >= 1, "
                 "2 * high <= H + top + 1, 2 * wide <= W + left + 1") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  const int32_t *options = static_cast<int32_t *>(params[1]);
  const int64_t top = options[0], left = options[1], high = options[2], wide = options[3];
  const int64_t height = shapes[0][2], width = shapes[0][3];
  float *y = static_cast<float *>(params[2]);
  parallel(shapes[0][0] * shapes[0][1], element_count(shapes[0], 4), [&](Tasks &tasks) {
    // Of the columns of a window's rows, with a border; then of three columns. As far as vectors reach.
    const int64_t length = round_up(std::max(width + left, 2 * wide + 1), kLanes) + kLanes;
    std::vector<float> columns(length, -INFINITY), windows(length);
    for (const int64_t plane : tasks) {
      for (int64_t i = 0; i < high; ++i) {
        const int64_t begin = std::max<int64_t>(2 * i - top, 0), end = std::min(2 * i - top + 3, height);
        const float *rows = x + plane * height * width;
        for_each_vector(width, [&](int64_t j, int count) {
          Vec largest = load_some(rows + begin * width + j, count);
          for (int64_t y = begin + 1; y < end; ++y) largest = maximum(largest, load_some(rows + y * width + j, count));
          store_some(columns.data() + left + j, largest, count);
        });
        for (int64_t j = 0; j < 2 * wide; j += kLanes) {
          const float *at = columns.data() + j;
          store(windows.data() + j, maximum(maximum(load(at), load(at + 1)), load(at + 2)));
        }
        float *to = y + (plane * high + i) * wide;
        for (int64_t j = 0; j < wide; ++j) to[j] = windows[2 * j];
      }
    }
  });
  return 0;
}

// The mean of size x size elements; rows and columns that fill no window are left out.
MINDSKA_OPERATOR(mindska_avg_pool,
                 "x (B, C, H, W), options {size} -> y (B, C, H / size, W / size) "
                 "where size >= 1, size <= H, size <= W") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  const int64_t size = *static_cast<int32_t *>(params[1]), height = shapes[0][2], width = shapes[0][3];
  float *y = static_cast<float *>(params[2]);
  const float elements = static_cast<float>(size * size);
  parallel_for_each_map(shapes[0], [=](int64_t plane) {
    const int64_t high = height / size, wide = width / size;
    std::vector<float> totals(width);  // of the columns of a window's rows
    for (int64_t i = 0; i < high; ++i) {
      std::fill(totals.begin(), totals.end(), 0.0f);
      for (int64_t line = 0; line < size; ++line) {
        const float *row = x + (plane * height + i * size + line) * width;
        for (int64_t j = 0; j < width; ++j) totals[j] += row[j];
      }
      for (int64_t j = 0; j < wide; ++j) {
        float total = 0;
        for (int64_t k = 0; k < size; ++k) total += totals[j * size + k];
        y[(plane * high + i) * wide + j] = total / elements;
      }
    }
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_global_avg_pool, "x (B, C, H, W) -> y (B, C)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  const int64_t pixels = shapes[0][2] * shapes[0][3];
  parallel_for_each_map(shapes[0], [=](int64_t plane) {
    y[plane] = sum_of(x + plane * pixels, pixels) / static_cast<float>(pixels);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_global_max_pool, "x (B, C, H, W) -> y (B, C)") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  const int64_t pixels = shapes[0][2] * shapes[0][3];
  parallel_for_each_map(shapes[0], [=](int64_t plane) {
    const float *map = x + plane * pixels;
    float largest = map[0];
    for (int64_t i = 1; i < pixels; ++i) largest = maximum(largest, map[i]);
    y[plane] = largest;
  });
  return 0;
}
