// Products of matrices whose columns are the pixels of a batch of feature maps (B, C, H, W): what a 1x1 convolution is.
//
// As in BLAS libraries the right side is packed: copied so that the innermost loop reads memory in order. That loop keeps a
// block of the result in registers. Of the left side it needs single numbers, which it reads where they are if they lie
// row by row; else this side is packed as well. `multiply` computes A * B, a weight times feature maps, and passes each
// vector of the result to an epilogue. `TransposedProduct` computes A * B^T of two feature maps, sums over the pixels: the gradient of
// the weight. The order of its sums depends on the shapes alone.
//
// B is `FeatureMaps`, or what has the same members: strided.cc has another.
#pragma once

#include "simd.h"
#include "workspace.h"

namespace mindska {

// Block sizes, chosen on two cores of an x86-64 with AVX-512.
#ifdef __AVX512F__
constexpr int kBlockRows = 8, kBlockVectors = 3;  // rows and vectors of a result's block in registers (BLIS: MR, NR)
constexpr int kDotBlock = 5;                      // rows and columns of a block of dot products in registers
#else  // a vector takes several registers
constexpr int kBlockRows = 6, kBlockVectors = 1;
constexpr int kDotBlock = 2;
#endif
constexpr int kPanelColumns = kBlockVectors * kLanes;      // columns of a panel of packed B: as wide as a block
constexpr int kTilePanels = 4;                             // panels of a tile: what a thread packs at once
constexpr int kTileColumns = kTilePanels * kPanelColumns;  // columns of a tile
constexpr int64_t kSumBlock = 64;     // products that are summed before the sum is added to others, which is more exact
constexpr int64_t kDotPixels = 1024;  // pixels, and
constexpr int64_t kDotRows = 80;      // rows of either side, of a chunk of dot products: it stays in the cache

// Part of the channels of feature maps (B, C, H, W).
struct FeatureMaps {
  float *data;
  int64_t batch, channels, pixels;

  FeatureMaps(const void *data, const int64_t *shape, int64_t first_channel = 0)
      : data(const_cast<float *>(static_cast<const float *>(data)) + first_channel * shape[2] * shape[3]),
        batch(shape[0]), channels(shape[1]), pixels(shape[2] * shape[3]) {}

  int64_t columns() const { return batch * pixels; }
  int64_t step() const { return channels * pixels; }  // from one image to the next
  float *row(int64_t channel) const { return data + channel * pixels; }  // of the first image
  int64_t target(int64_t pixel) const { return pixel; }  // where a result belongs in its map; -1: nowhere
};

// kBlockRows rows of a left side, column by column: element (i, k) is at k * kBlockRows + i.
struct PackedBlock {
  const float *at;

  float operator()(int i, int64_t k) const { return at[k * kBlockRows + i]; }
  PackedBlock from(int64_t k) const { return {at + k * kBlockRows}; }
};

// kBlockRows rows of a left side, each somewhere.
struct RowsBlock {
  const float *rows[kBlockRows];

  float operator()(int i, int64_t k) const { return rows[i][k]; }
  RowsBlock from(int64_t k) const {
    RowsBlock block;
    for (int i = 0; i < kBlockRows; ++i) block.rows[i] = rows[i] + k;
    return block;
  }
};

// Of a product of `rows` x `depth` with so many columns, as `parallel` wants it.
static inline int64_t product_work(int64_t rows, int64_t depth, int64_t columns) {
  return rows * std::max<int64_t>(depth, kLanes) * columns / kLanes;
}

// A matrix (rows, depth) row by row, as weights lie in memory.
struct RowMatrix {
  int64_t rows, depth;
  const float *values;

  // Beyond the last row: that one again, whose results are left out.
  RowsBlock block(int64_t row) const {
    RowsBlock block;
    for (int64_t i = 0; i < kBlockRows; ++i) block.rows[i] = values + std::min(row + i, rows - 1) * depth;
    return block;
  }
  RowMatrix part(int64_t first, int64_t count) const { return {count, depth, values + first * depth}; }
  int64_t work(int64_t columns) const { return product_work(rows, depth, columns); }
};

// A matrix (rows, depth) in blocks of kBlockRows rows, each block column by column; the last block is filled up with
// zeros. The values belong to a PackedMatrix.
struct PackedView {
  int64_t rows, depth;
  const float *values;

  PackedBlock block(int64_t row) const { return {values + row * depth}; }  // `row`: the first of a block

  // `count` rows, of which `first` is the first of a block.
  PackedView part(int64_t first, int64_t count) const { return {count, depth, values + first * depth}; }

  int64_t work(int64_t columns) const { return product_work(rows, depth, columns); }

  static int64_t padded_rows(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }
};

class PackedMatrix : public PackedView {
 public:
  // Packs the values element(row, column). The slot is in use until the matrix is gone.
  template <typename Element>
  PackedMatrix(int64_t rows, int64_t depth, Element element, Slot slot = Slot::kPackedWeight)
      : PackedMatrix(Workspace(slot, padded_rows(rows) * depth), rows, depth) {
    float *packed = workspace_.data();
    parallel_for(padded_rows(rows) / kBlockRows, rows * depth, [&](int64_t task) {
      const int64_t block = task * kBlockRows;
      float *to = packed + block * depth;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < kBlockRows; ++i) *to++ = block + i < rows ? element(block + i, k) : 0;
      }
    });
  }

 private:
  PackedMatrix(Workspace workspace, int64_t rows, int64_t depth)
      : PackedView{rows, depth, workspace.data()}, workspace_(std::move(workspace)) {}

  Workspace workspace_;
};

// Some columns of B, in the order of images and pixels.
class Columns {
 public:
  template <typename Matrix>
  Columns(const Matrix &b, int64_t first, int64_t count) : count(count) {
    int64_t image = first / b.pixels, pixel = first % b.pixels;
    for (int64_t i = 0; i < count; ++i) {
      image_[i] = image;
      pixel_[i] = pixel;
      target_[i] = b.target(pixel);
      if (++pixel == b.pixels) pixel = 0, ++image;
    }
    for (int v = 0; v < vectors(); ++v) {
      const int64_t begin = v * kLanes, last = begin + kLanes - 1;
      contiguous_[v] = last < count && image_[last] == image_[begin];
      contiguous_target_[v] = contiguous_[v] && target_[begin] >= 0;
      for (int64_t i = begin; contiguous_target_[v] && i < last; ++i) {
        contiguous_target_[v] = target_[i + 1] == target_[i] + 1;
      }
    }
  }

  int vectors() const { return static_cast<int>((count + kLanes - 1) / kLanes); }

  // The values of other feature maps at the places of a vector of the result.
  Vec load_vector(const FeatureMaps &maps, int64_t channel, int vector) const {
    const float *from = maps.row(channel);
    const int64_t begin = vector * kLanes;
    if (contiguous_target_[vector]) return load(from + image_[begin] * maps.step() + target_[begin]);
    Vec v = {};
    for (int64_t i = begin; i < std::min<int64_t>(count, begin + kLanes); ++i) {
      if (target_[i] >= 0) v[i - begin] = from[image_[i] * maps.step() + target_[i]];
    }
    return v;
  }

  void store_vector(const FeatureMaps &maps, int64_t channel, int vector, Vec v) const {
    float *to = maps.row(channel);
    const int64_t begin = vector * kLanes;
    if (contiguous_target_[vector]) return store(to + image_[begin] * maps.step() + target_[begin], v);
    for (int64_t i = begin; i < std::min<int64_t>(count, begin + kLanes); ++i) {
      if (target_[i] >= 0) to[image_[i] * maps.step() + target_[i]] = v[i - begin];
    }
  }

  // Packs rows [0, depth) of N vectors from `vector` on: a panel.
  template <int N, typename Matrix>
  void pack(const Matrix &b, int64_t depth, int vector, float *to) const {
    const int64_t begin = vector * kLanes;
    if (std::all_of(contiguous_ + vector, contiguous_ + vector + N, [](bool contiguous) { return contiguous; })) {
      int64_t from[N];
      for (int j = 0; j < N; ++j) from[j] = offset(b, begin + j * kLanes);
      for (int64_t k = 0; k < depth; ++k, to += N * kLanes) {
        for (int j = 0; j < N; ++j) store(to + j * kLanes, load(b.row(k) + from[j]));
      }
    } else {
      for (int64_t k = 0; k < depth; ++k, to += N * kLanes) {
        for (int64_t i = 0; i < N * kLanes; ++i) {
          to[i] = begin + i < count ? b.row(k)[offset(b, begin + i)] : 0;
        }
      }
    }
  }

  const int64_t count;

 private:
  template <typename Matrix>
  int64_t offset(const Matrix &b, int64_t column) const {
    return image_[column] * b.step() + pixel_[column];
  }

  int64_t image_[kTileColumns], pixel_[kTileColumns], target_[kTileColumns];
  bool contiguous_[kTileColumns / kLanes];         // whether a vector's columns lie side by side in B,
  bool contiguous_target_[kTileColumns / kLanes];  // and in the result
};

// Adds `depth` products to a block of kBlockRows x N vectors. `stride`: from one row of `right` to the next.
template <int N, typename Block>
static inline void add_products(int64_t depth, const Block &left, const float *right, int64_t stride,
                                Vec (&sums)[kBlockRows][N]) {
  for (int64_t k = 0; k < depth; ++k, right += stride) {
    Vec values[N];
    for (int j = 0; j < N; ++j) values[j] = load(right + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i) {
      const Vec factor = splat(left(i, k));
      for (int j = 0; j < N; ++j) sums[i][j] += factor * values[j];
    }
  }
}

// A block of kBlockRows x N vectors of a product; epilogue(row, vector, value) takes each vector of it.
template <int N, typename Block, typename Epilogue>
static inline void multiply_block(int64_t depth, const Block &left, const float *right, int64_t stride,
                                  Epilogue epilogue) {
  Vec total[kBlockRows][N] = {};
  for (int64_t k = 0; k < depth; k += kSumBlock) {
    Vec sums[kBlockRows][N] = {};
    add_products(std::min(kSumBlock, depth - k), left.from(k), right + k * stride, stride, sums);
    for (int i = 0; i < kBlockRows; ++i) {
      for (int j = 0; j < N; ++j) total[i][j] += sums[i][j];
    }
  }
  for (int i = 0; i < kBlockRows; ++i) {
    for (int j = 0; j < N; ++j) epilogue(i, j, total[i][j]);
  }
}

// The same for a panel of `vectors` vectors.
template <typename Block, typename Epilogue>
static inline void multiply_panel(int64_t depth, const Block &left, const float *panel, int vectors, Epilogue epilogue) {
  switch (vectors) {
    case 1: return multiply_block<1>(depth, left, panel, kLanes, epilogue);
    case 2: return multiply_block<2>(depth, left, panel, 2 * kLanes, epilogue);
    default: return multiply_block<kBlockVectors>(depth, left, panel, kPanelColumns, epilogue);
  }
}

// The tasks of a product: its columns in tiles of whole panels, about as many for each thread; where there is one tile
// only, the rows are divided, in whole blocks.
struct Tiles {
  int64_t rows, columns, panels, count, row_parts = 1;

  Tiles(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), panels((columns + kPanelColumns - 1) / kPanelColumns) {
    const int64_t threads = mindska_threads(), least = (panels + kTilePanels - 1) / kTilePanels;
    count = least == 1 ? 1 : std::min(panels, (least + threads - 1) / threads * threads);
    if (count == 1) row_parts = std::min(threads, row_blocks());
  }

  int64_t tasks() const { return count * row_parts; }
  int64_t row_blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  int64_t begin(int64_t tile) const { return std::min(columns, tile * panels / count * kPanelColumns); }
  int64_t first_row(int64_t part) const { return std::min(rows, part * row_blocks() / row_parts * kBlockRows); }
};

// A task of A * B; epilogue(columns, row, vector, value) takes each vector of it. A: a PackedView or a RowMatrix. `packed`:
// room for a.depth rows of a tile.
template <typename Left, typename Matrix, typename Epilogue>
static void multiply_tile(const Left &a, const Matrix &b, const Tiles &tiles, int64_t task, float *packed,
                          Epilogue epilogue) {
  const int64_t tile = task / tiles.row_parts, part = task % tiles.row_parts;
  const Columns columns(b, tiles.begin(tile), tiles.begin(tile + 1) - tiles.begin(tile));
  const int vectors = columns.vectors();
  for (int v = 0; v < vectors; v += kBlockVectors) {
    float *panel = packed + v * kLanes * a.depth;
    switch (std::min(kBlockVectors, vectors - v)) {
      case 1: columns.pack<1>(b, a.depth, v, panel); break;
      case 2: columns.pack<2>(b, a.depth, v, panel); break;
      default: columns.pack<kBlockVectors>(b, a.depth, v, panel);
    }
  }
  for (int64_t row = tiles.first_row(part); row < tiles.first_row(part + 1); row += kBlockRows) {
    const auto left = a.block(row);
    for (int v = 0; v < vectors; v += kBlockVectors) {
      const float *panel = packed + v * kLanes * a.depth;
      const auto block_epilogue = [&](int i, int j, Vec value) {
        if (row + i < a.rows) epilogue(columns, row + i, v + j, value);
      };
      multiply_panel(a.depth, left, panel, std::min(kBlockVectors, vectors - v), block_epilogue);
    }
  }
}

// A * B, tile by tile.
template <typename Left, typename Matrix, typename Epilogue>
static void multiply(const Left &a, const Matrix &b, Epilogue epilogue) {
  const Tiles tiles(a.rows, b.columns());
  parallel(tiles.tasks(), a.work(b.columns()), [&](Tasks &tasks) {
    const Workspace packed(Slot::kPackedColumns, a.depth * kTileColumns);
    for (const int64_t task : tasks) multiply_tile(a, b, tiles, task, packed.data(), epilogue);
  });
}

// Rows of floats, `stride` floats apart, aligned and readable in whole vectors.
struct RowView {
  const float *data;
  int64_t stride;

  const float *row(int64_t i) const { return data + i * stride; }
};

// A chunk of pixels of some channels: packed rows, filled up with zeros to whole vectors.
class PackedRows {
 public:
  explicit PackedRows(Slot slot) : workspace_(slot, kDotRows * kStride) {}

  RowView view() const { return {workspace_.data(), kStride}; }

  // Packs channels [first, last) of the columns [from, from + count).
  template <typename Matrix>
  void pack(const Matrix &matrix, int64_t first, int64_t last, int64_t from, int64_t count) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t channel = first; channel < last; ++channel) {
      float *to = workspace_.data() + (channel - first) * kStride;
      int64_t image = from / matrix.pixels, pixel = from % matrix.pixels;
      for (int64_t done = 0; done < count; ++image, pixel = 0) {
        const int64_t part = std::min(count - done, matrix.pixels - pixel);
        std::memcpy(to + done, matrix.row(channel) + image * matrix.step() + pixel, part * sizeof(float));
        done += part;
      }
      std::fill(to + count, to + padded, 0.0f);
    }
  }

 private:
  static constexpr int64_t kStride = kDotPixels + kLanes;  // no power of two: rows would share few sets of the cache
  Workspace workspace_;
};

// Adds to sums[i * stride + j] the dot products of rows i of `lefts` and j of `rights`: up to kDotBlock of each, from
// `left` and `right` on; `rows` and `columns`: how many there are. What lies beyond `count` in the last vector counts as
// well: it must be 0 on one side.
static inline void add_dot_block(const RowView &lefts, int64_t left, int64_t rows, const RowView &rights, int64_t right,
                                 int64_t columns, int64_t count, float *sums, int64_t stride) {
  Vec total[kDotBlock][kDotBlock] = {};
  const float *a[kDotBlock], *b[kDotBlock];
  for (int i = 0; i < kDotBlock; ++i) {  // beyond the last row: that one again, whose result is left out
    a[i] = lefts.row(std::min(left + i, rows - 1));
    b[i] = rights.row(std::min(right + i, columns - 1));
  }
  for (int64_t p = 0; p < count; p += kLanes) {
    Vec values[kDotBlock];
    for (int j = 0; j < kDotBlock; ++j) values[j] = load(b[j] + p);
#pragma GCC unroll 8
    for (int i = 0; i < kDotBlock; ++i) {
      const Vec value = load(a[i] + p);
      for (int j = 0; j < kDotBlock; ++j) total[i][j] += value * values[j];
    }
  }
  for (int i = 0; i < std::min<int64_t>(kDotBlock, rows - left); ++i) {
    for (int j = 0; j < std::min<int64_t>(kDotBlock, columns - right); ++j) {
      sums[(left + i) * stride + right + j] += sum(total[i][j]);
    }
  }
}

// sums += lefts * rights^T, `count` products a sum.
static inline void add_dot_products(const RowView &lefts, int64_t rows, const RowView &rights, int64_t columns,
                                    int64_t count, float *sums, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kDotBlock) {
    for (int64_t i = 0; i < rows; i += kDotBlock) add_dot_block(lefts, i, rows, rights, j, columns, count, sums, stride);
  }
}

// A * B^T (BLAS: the second matrix transposed), sums over all pixels: product[i * columns + j] for `rows` channels i of A
// and `columns` channels j of B; totals[i]: the sum of channel i of A. In parts of the product, one a task.
class TransposedProduct {
 public:
  TransposedProduct(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), row_parts_((rows + kDotRows - 1) / kDotRows),
        column_parts_((columns + kDotRows - 1) / kDotRows) {
    while (row_parts_ * column_parts_ % mindska_threads() && column_parts_ < columns) ++column_parts_;
  }

  int64_t tasks() const { return row_parts_ * column_parts_; }

  template <typename Matrix>
  void compute(int64_t task, const FeatureMaps &a, const Matrix &b, float *product, float *totals) const {
    PackedRows lefts(Slot::kPackedLeftRows), rights(Slot::kPackedRightRows);
    const int64_t row_part = task / column_parts_, column_part = task % column_parts_;
    const int64_t first = row_part * rows_ / row_parts_, last = (row_part + 1) * rows_ / row_parts_;
    const int64_t from = column_part * columns_ / column_parts_, to = (column_part + 1) * columns_ / column_parts_;
    for (int64_t i = first; i < last; ++i) std::fill(product + i * columns_ + from, product + i * columns_ + to, 0.0f);
    if (from == 0) std::fill(totals + first, totals + last, 0.0f);
    for (int64_t pixel = 0; pixel < a.columns(); pixel += kDotPixels) {
      const int64_t count = std::min(kDotPixels, a.columns() - pixel);
      lefts.pack(a, first, last, pixel, count);
      rights.pack(b, from, to, pixel, count);
      add_dot_products(lefts.view(), last - first, rights.view(), to - from, count, product + first * columns_ + from,
                       columns_);
      for (int64_t i = first; from == 0 && i < last; ++i) totals[i] += sum_of(lefts.view().row(i - first), count);
    }
  }

 private:
  int64_t rows_, columns_, row_parts_, column_parts_;
};

}  // namespace mindska
