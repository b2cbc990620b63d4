// Products of matrices whose columns are the pixels of a batch of maps (B, C, H, W): what a 1x1 convolution is.
//
// `multiply` computes weights times maps. Some columns of the maps are copied side by side, so that the innermost loop
// reads memory in order; that loop keeps a block of the result in registers. `multiply_turned` computes the products of
// two maps summed over the pixels: the weights' gradient. The order of its sums depends on the shapes alone.
//
// A Source of columns is `Maps`, or what has the same members: strided.cc has another.
#pragma once

#include "simd.h"

namespace mindska {

// The block of a result that fits into the registers: rows times vectors, and rows times columns of dot products.
#ifdef __AVX512F__
constexpr int kRows = 8, kVectors = 3, kDots = 5;
#else
constexpr int kRows = 6, kVectors = 1, kDots = 2;
#endif
constexpr int kColumns = kVectors * kLanes;
constexpr int kPanels = 4;          // copied at once, kColumns each
constexpr int kTile = kPanels * kColumns;
constexpr int64_t kSum = 64;        // products that are summed before the sum is added to others
constexpr int64_t kChunk = 1024;    // pixels that dot products take at once,
constexpr int64_t kTogether = 80;   // and the rows of either map that stay in the cache meanwhile

enum Purpose { kWeights, kMoreWeights, kEvenMoreWeights, kCopies, kLefts, kRights, kTotals, kBefore, kAfter, kSlopes };

// Part of the channels of maps (B, C, H, W).
struct Maps {
  float *data;
  int64_t batch, channels, pixels;

  Maps(const void *data, const int64_t *shape, int64_t channels_before = 0)
      : data(const_cast<float *>(static_cast<const float *>(data)) + channels_before * shape[2] * shape[3]),
        batch(shape[0]), channels(shape[1]), pixels(shape[2] * shape[3]) {}

  int64_t columns() const { return batch * pixels; }
  int64_t step() const { return channels * pixels; }  // from one image to the next
  float *row(int64_t channel) const { return data + channel * pixels; }  // of the first image
  int64_t target(int64_t pixel) const { return pixel; }  // where a result belongs in its map; -1: nowhere
};

// Weights (rows, depth), copied in blocks of kRows rows.
class Weights {
 public:
  // element(row, depth) are the values.
  template <typename Element>
  Weights(int64_t rows, int64_t depth, Element element, Purpose purpose = kWeights)
      : rows(rows), depth(depth), values_(scratch(purpose, padded(rows) * depth)) {
#pragma omp parallel for schedule(static) if (rows * depth > kAlone)
    for (int64_t block = 0; block < rows; block += kRows) {
      float *to = values_ + block * depth;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < kRows; ++i) *to++ = block + i < rows ? element(block + i, k) : 0;
      }
    }
  }

  const float *block(int64_t row) const { return values_ + row * depth; }

  // Some of the rows; `first` is the first of a block.
  Weights part(int64_t first, int64_t rows) const { return Weights(rows, depth, values_ + first * depth); }

  // Whether a product with so many columns is worth waking other threads for.
  bool worth(int64_t columns) const { return rows * std::max<int64_t>(depth, kLanes) * columns > kAlone * kLanes; }

  static int64_t padded(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

  const int64_t rows, depth;

 private:
  Weights(int64_t rows, int64_t depth, float *values) : rows(rows), depth(depth), values_(values) {}

  float *values_;
};

// Some columns of a source, in the order of images and pixels.
class Columns {
 public:
  template <typename Source>
  Columns(const Source &source, int64_t first, int64_t count) : count(count) {
    int64_t image = first / source.pixels, pixel = first % source.pixels;
    for (int64_t i = 0; i < count; ++i) {
      image_[i] = image;
      pixel_[i] = pixel;
      target_[i] = source.target(pixel);
      if (++pixel == source.pixels) pixel = 0, ++image;
    }
    for (int v = 0; v < vectors(); ++v) {
      const int64_t begin = v * kLanes, last = begin + kLanes - 1;
      whole_[v] = last < count && image_[last] == image_[begin];
      whole_target_[v] = whole_[v] && target_[begin] >= 0;
      for (int64_t i = begin; whole_target_[v] && i < last; ++i) whole_target_[v] = target_[i + 1] == target_[i] + 1;
    }
  }

  int vectors() const { return static_cast<int>((count + kLanes - 1) / kLanes); }

  // What other maps hold where a vector of results belongs.
  Vec load_vector(const Maps &maps, int64_t channel, int vector) const {
    const float *from = maps.row(channel);
    const int64_t begin = vector * kLanes;
    if (whole_target_[vector]) return load(from + image_[begin] * maps.step() + target_[begin]);
    Vec v = {};
    for (int64_t i = begin; i < std::min<int64_t>(count, begin + kLanes); ++i) {
      if (target_[i] >= 0) v[i - begin] = from[image_[i] * maps.step() + target_[i]];
    }
    return v;
  }

  void store_vector(const Maps &maps, int64_t channel, int vector, Vec v) const {
    float *to = maps.row(channel);
    const int64_t begin = vector * kLanes;
    if (whole_target_[vector]) return store(to + image_[begin] * maps.step() + target_[begin], v);
    for (int64_t i = begin; i < std::min<int64_t>(count, begin + kLanes); ++i) {
      if (target_[i] >= 0) to[image_[i] * maps.step() + target_[i]] = v[i - begin];
    }
  }

  // Copies rows [0, depth) of N vectors from `vector` on side by side.
  template <int N, typename Source>
  void copy(const Source &source, int64_t depth, int vector, float *to) const {
    const int64_t begin = vector * kLanes;
    if (std::all_of(whole_ + vector, whole_ + vector + N, [](bool whole) { return whole; })) {
      int64_t from[N];
      for (int j = 0; j < N; ++j) from[j] = offset(source, begin + j * kLanes);
      for (int64_t k = 0; k < depth; ++k, to += N * kLanes) {
        for (int j = 0; j < N; ++j) store(to + j * kLanes, load(source.row(k) + from[j]));
      }
    } else {
      for (int64_t k = 0; k < depth; ++k, to += N * kLanes) {
        for (int64_t i = 0; i < N * kLanes; ++i) {
          to[i] = begin + i < count ? source.row(k)[offset(source, begin + i)] : 0;
        }
      }
    }
  }

  const int64_t count;

 private:
  template <typename Source>
  int64_t offset(const Source &source, int64_t column) const {
    return image_[column] * source.step() + pixel_[column];
  }

  int64_t image_[kTile], pixel_[kTile], target_[kTile];
  bool whole_[kTile / kLanes];         // whether a vector's columns lie side by side,
  bool whole_target_[kTile / kLanes];  // and where its results belong as well
};

// Adds `depth` products to a block of kRows x N vectors. `stride`: from one row of `right` to the next.
template <int N>
static inline void add_products(int64_t depth, const float *left, const float *right, int64_t stride,
                                Vec (&sums)[kRows][N]) {
  for (int64_t k = 0; k < depth; ++k, left += kRows, right += stride) {
    Vec values[N];
    for (int j = 0; j < N; ++j) values[j] = load(right + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec weight = splat(left[i]);
      for (int j = 0; j < N; ++j) sums[i][j] += weight * values[j];
    }
  }
}

// A block of kRows x N vectors of a product; finish(row, vector, value) takes the result. Long sums are made of shorter
// ones: that is more exact.
template <int N, typename Finish>
static inline void block(int64_t depth, const float *left, const float *right, int64_t stride, Finish finish) {
  Vec total[kRows][N] = {};
  for (int64_t k = 0; k < depth; k += kSum) {
    Vec sums[kRows][N] = {};
    add_products(std::min(kSum, depth - k), left + k * kRows, right + k * stride, stride, sums);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < N; ++j) total[i][j] += sums[i][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < N; ++j) finish(i, j, total[i][j]);
  }
}

// The blocks of a row of them, for some vectors of the right side.
template <typename Finish>
static inline void blocks(int64_t depth, const float *left, const float *right, int vectors, Finish finish) {
  switch (vectors) {
    case 1: return block<1>(depth, left, right, kLanes, finish);
    case 2: return block<2>(depth, left, right, 2 * kLanes, finish);
    default: return block<kVectors>(depth, left, right, kColumns, finish);
  }
}

// Weights times `maps`. finish(columns, row, vector, value) takes a vector of the product. To be called from within
// a parallel region; a thread goes on without waiting for the others.
template <typename Source, typename Finish>
static void multiply(const Weights &weights, const Source &maps, Finish finish) {
  float *buffer = scratch(kCopies, weights.depth * kTile);
  const int64_t panels = (maps.columns() + kColumns - 1) / kColumns;
  const int64_t workers = threads();
  const int64_t tiles = std::min(panels, ((panels + kPanels - 1) / kPanels + workers - 1) / workers * workers);
#pragma omp for schedule(static) nowait
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * panels / tiles * kColumns;
    const int64_t end = std::min(maps.columns(), (tile + 1) * panels / tiles * kColumns);
    const Columns columns(maps, first, end - first);
    const int vectors = columns.vectors();
    for (int v = 0; v < vectors; v += kVectors) {
      float *to = buffer + v * kLanes * weights.depth;
      switch (std::min(kVectors, vectors - v)) {
        case 1: columns.copy<1>(maps, weights.depth, v, to); break;
        case 2: columns.copy<2>(maps, weights.depth, v, to); break;
        default: columns.copy<kVectors>(maps, weights.depth, v, to);
      }
    }
    for (int64_t row = 0; row < weights.rows; row += kRows) {
      for (int v = 0; v < vectors; v += kVectors) {
        const float *from = buffer + v * kLanes * weights.depth;
        const auto take = [&](int i, int j, Vec value) {
          if (row + i < weights.rows) finish(columns, row + i, v + j, value);
        };
        blocks(weights.depth, weights.block(row), from, std::min(kVectors, vectors - v), take);
      }
    }
  }
}

// Rows of floats at a distance, aligned and readable in whole vectors.
struct Strided {
  const float *data;
  int64_t stride;

  const float *row(int64_t i) const { return data + i * stride; }
};

// The rows of some maps, a chunk of pixels of each: copied side by side, filled up with zeros to whole vectors.
class Rows {
 public:
  explicit Rows(int purpose) : values_(scratch(purpose, kTogether * kStride)) {}

  const float *row(int64_t i) const { return values_ + i * kStride; }

  Strided all() const { return {values_, kStride}; }

  // Copies channels [first, last) of the pixels [from, from + count) of all images, these side by side as well.
  template <typename Source>
  void copy(const Source &maps, int64_t first, int64_t last, int64_t from, int64_t count) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t channel = first; channel < last; ++channel) {
      float *to = values_ + (channel - first) * kStride;
      int64_t image = from / maps.pixels, pixel = from % maps.pixels;
      for (int64_t done = 0; done < count; ++image, pixel = 0) {
        const int64_t part = std::min(count - done, maps.pixels - pixel);
        std::memcpy(to + done, maps.row(channel) + image * maps.step() + pixel, part * sizeof(float));
        done += part;
      }
      std::fill(to + count, to + padded, 0.0f);
    }
  }

 private:
  static constexpr int64_t kStride = kChunk + kLanes;  // no power of two: rows would contend for the cache's places
  float *values_;
};

// Adds to sums[i * stride + j] the dot products of rows `left` + i and `right` + j, up to kDots of each. rows, columns: how
// many there are. What lies beyond `count` in the last vector counts as well: it must be 0 on one side.
static inline void dots(const Strided &lefts, int64_t left, int64_t rows, const Strided &rights, int64_t right,
                        int64_t columns, int64_t count, float *sums, int64_t stride) {
  Vec total[kDots][kDots] = {};
  const float *a[kDots], *b[kDots];
  for (int i = 0; i < kDots; ++i) {  // beyond the last row: that one again, whose result is left out
    a[i] = lefts.row(std::min(left + i, rows - 1));
    b[i] = rights.row(std::min(right + i, columns - 1));
  }
  for (int64_t p = 0; p < count; p += kLanes) {
    Vec values[kDots];
    for (int j = 0; j < kDots; ++j) values[j] = load(b[j] + p);
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i) {
      const Vec value = load(a[i] + p);
      for (int j = 0; j < kDots; ++j) total[i][j] += value * values[j];
    }
  }
  for (int i = 0; i < std::min<int64_t>(kDots, rows - left); ++i) {
    for (int j = 0; j < std::min<int64_t>(kDots, columns - right); ++j) {
      sums[(left + i) * stride + right + j] += sum(total[i][j]);
    }
  }
}

// The same for all rows.
static inline void all_dots(const Strided &lefts, int64_t rows, const Strided &rights, int64_t columns, int64_t count,
                            float *sums, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kDots) {
    for (int64_t i = 0; i < rows; i += kDots) dots(lefts, i, rows, rights, j, columns, count, sums, stride);
  }
}

// product[i][j]: the dot product over all pixels of `rows` channels i of `left` and `columns` channels j of `right`;
// totals[i]: the sum of channel i of `left`. To be called from within a parallel region.
template <typename Source>
static void multiply_turned(const Maps &left, int64_t rows, const Source &right, int64_t columns, float *product,
                            float *totals) {
  const int64_t above = (rows + kTogether - 1) / kTogether, workers = threads();
  int64_t beside = (columns + kTogether - 1) / kTogether;
  while (above * beside % workers && beside < columns) ++beside;
  Rows lefts(kLefts), rights(kRights);
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < above * beside; ++task) {
    const int64_t first = task / beside * rows / above, last = (task / beside + 1) * rows / above;
    const int64_t from = task % beside * columns / beside, to = (task % beside + 1) * columns / beside;
    for (int64_t i = first; i < last; ++i) std::fill(product + i * columns + from, product + i * columns + to, 0.0f);
    if (from == 0) std::fill(totals + first, totals + last, 0.0f);
    for (int64_t pixel = 0; pixel < left.columns(); pixel += kChunk) {
      const int64_t count = std::min(kChunk, left.columns() - pixel);
      lefts.copy(left, first, last, pixel, count);
      rights.copy(right, from, to, pixel, count);
      all_dots(lefts.all(), last - first, rights.all(), to - from, count, product + first * columns + from, columns);
      for (int64_t i = first; from == 0 && i < last; ++i) totals[i] += sum_of(lefts.row(i - first), count);
    }
  }
}

}  // namespace mindska
