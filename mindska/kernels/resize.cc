// Feature maps at another size, linear between the pixels of both axes; and the gradient. `rows` and `columns` say
// where the new pixels lie among the old ones: 1.25 is between number 1, weighed 0.75, and number 2, weighed 0.25.
#include "workspace.h"

namespace mindska {

// `first` and `second` have numbers of pixels, `weight` those of the second: of `count`, in whole vectors.
struct Places {
  int64_t count;
  std::vector<int32_t> first, second;
  std::vector<float> weight;

  Places(const float *places, int64_t count, int64_t size) : count(count) {
    for (int64_t i = 0; i < count; ++i) {
      if (!(places[i] >= 0 && places[i] <= static_cast<float>(size - 1)) || (i && places[i] < places[i - 1])) {
        throw Refused("a pixel lies outside, or before the last one", kWrongValue);
      }
      const int32_t from = static_cast<int32_t>(places[i]);
      const float rest = places[i] - static_cast<float>(from);
      first.push_back(from);
      second.push_back(rest > 0 ? from + 1 : from);  // NaN of a pixel with the weight 0 does not count
      weight.push_back(rest);
    }
    while (first.size() % kLanes) first.push_back(first.back()), second.push_back(second.back()), weight.push_back(0);
  }

  // A vector of them of a row, which can be read a vector beyond its end.
  Vec gather(const float *row, int64_t i) const {
    Vec a = {}, b = {};
#if defined(__AVX512F__) && !defined(__clang__)
    const int32_t begin = first[i];
    if (second[i + kLanes - 1] - begin < kLanes) {  // all in one vector: an instruction picks them
      IntVec from, to;
      std::memcpy(&from, first.data() + i, sizeof from);
      std::memcpy(&to, second.data() + i, sizeof to);
      const Vec values = load(row + begin);
      a = __builtin_shuffle(values, from - begin), b = __builtin_shuffle(values, to - begin);
      return mix(a, b, load(weight.data() + i));
    }
#endif
    for (int j = 0; j < kLanes; ++j) a[j] = row[first[i + j]], b[j] = row[second[i + j]];
    return mix(a, b, load(weight.data() + i));
  }

  static Vec mix(Vec a, Vec b, Vec weight) { return (1.0f - weight) * a + weight * b; }
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_resize, "x (B, C, h, w), rows (H), columns (W) -> y (B, C, H, W)") {
  using namespace mindska;
  const int64_t planes = shapes[0][0] * shapes[0][1], height = shapes[0][2], width = shapes[0][3];
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[3]);
  const Places rows(static_cast<float *>(params[1]), shapes[1][0], height);
  const Places columns(static_cast<float *>(params[2]), shapes[2][0], width);
  parallel_for(planes, planes * rows.count * columns.count, [&](int64_t plane) {
    const Workspace row(Slot::kPaddedInput, width + 2 * kLanes);
    for (int64_t i = 0; i < rows.count; ++i) {
      const float *above = x + (plane * height + rows.first[i]) * width;
      const float *below = x + (plane * height + rows.second[i]) * width;
      const Vec weight = splat(rows.weight[i]);
      for_each_vector(width, [&](int64_t j, int count) {
        store(row.data() + j, Places::mix(load_some(above + j, count), load_some(below + j, count), weight));
      });
      float *to = y + (plane * rows.count + i) * columns.count;
      for_each_vector(columns.count,
                      [&](int64_t j, int count) { store_some(to + j, columns.gather(row.data(), j), count); });
    }
  });
  return 0;
}

// x: for its size alone.
MINDSKA_OPERATOR(mindska_resize_grad, "x (B, C, h, w), rows (H), columns (W), dy (B, C, H, W) -> dx (B, C, h, w)") {
  using namespace mindska;
  const int64_t planes = shapes[0][0] * shapes[0][1], height = shapes[0][2], width = shapes[0][3];
  const float *dy = static_cast<float *>(params[3]);
  float *dx = static_cast<float *>(params[4]);
  const Places rows(static_cast<float *>(params[1]), shapes[1][0], height);
  const Places columns(static_cast<float *>(params[2]), shapes[2][0], width);
  parallel_for(planes, planes * rows.count * columns.count, [&](int64_t plane) {
    const Workspace workspace(Slot::kPaddedGradient, columns.count + kLanes);
    float *sums = workspace.data(), *to = dx + plane * height * width;
    std::fill(to, to + height * width, 0.0f);
    for (int64_t row = 0, begin = 0; row < height; ++row) {
      // The sum of the rows that lie between the row before and the row after, weighed; then along it.
      while (begin < rows.count && rows.second[begin] < row) ++begin;
      std::fill(sums, sums + columns.count, 0.0f);
      for (int64_t i = begin; i < rows.count && rows.first[i] <= row; ++i) {
        const float upper = rows.first[i] == row ? 1 - rows.weight[i] : 0;
        const float weight = upper + (rows.second[i] == row ? rows.weight[i] : 0);
        const float *from = dy + (plane * rows.count + i) * columns.count;
        for_each_vector(columns.count, [&](int64_t j, int count) {
          store_some(sums + j, load_some(sums + j, count) + weight * load_some(from + j, count), count);
        });
      }
      for (int64_t j = 0; j < columns.count; ++j) {
        to[row * width + columns.first[j]] += (1 - columns.weight[j]) * sums[j];
        to[row * width + columns.second[j]] += columns.weight[j] * sums[j];
      }
    }
  });
  return 0;
}
