// The 3x3 convolution with stride 1 and any dilation, padded so that the size stays; and its gradients.
//
// Winograd's algorithm F(2x2, 3x3) (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016): a tile of
// 2x2 outputs sees 4x4 inputs d, and is A' [(G g G') . (B' d B)] A for the kernel g, with . element by element. Summed
// over the channels that is 16 products of matrices, one for each place in the tile: 16 multiplications a tile where the
// equation has 36. The matrices hold 0, 1, -1 and 1/2 only, and results are as near to the exact ones as those of the
// equation in float32. No output depends on an input that it does not see. The gradient of the weight is
// G' [sum of (A dy A') . (B' d B)] G.
//
// Tiles are transformed a few at a time, while they are in the cache. With a dilation, the outputs of a tile are as far
// apart as the taps (elements of the kernel) are.
#include "activation.h"
#include "matrix.h"
#include "shuffle.h"

namespace mindska {

constexpr int kTaps = 9, kPlaces = 16;      // of a kernel, and of a tile
constexpr int kBlockTiles = 3 * kLanes;     // tiles of a block
constexpr int64_t kDepthBlock = 256;        // channels that are transformed at once
constexpr int64_t kChunkTiles = kSumBlock;  // tiles that are summed before the sum is added to others
// Of a part of the gradient of the weight at most. Its rows lie in vectors of whole blocks.
constexpr int64_t kGradRows = 8 * kBlockRows, kGradColumns = 6 * kLanes;
constexpr int64_t kVectorRows = kLanes / kBlockRows * kBlockRows;
// Between the 16 matrices: at a distance of a power of 2 they would share few sets of the cache.
constexpr int64_t kGap = kLanes;
static_assert(kBlockTiles % kPanelColumns == 0 && kGradColumns % kPanelColumns == 0, "whole panels");

// B' d B, in place.
static inline void transform_input(Vec (&d)[4][4]) {
  for (int i = 0; i < 4; ++i) {
    const Vec first = d[0][i] - d[2][i], second = d[1][i] + d[2][i];
    const Vec third = d[2][i] - d[1][i], last = d[1][i] - d[3][i];
    d[0][i] = first, d[1][i] = second, d[2][i] = third, d[3][i] = last;
  }
  for (int i = 0; i < 4; ++i) {
    const Vec first = d[i][0] - d[i][2], second = d[i][1] + d[i][2];
    const Vec third = d[i][2] - d[i][1], last = d[i][1] - d[i][3];
    d[i][0] = first, d[i][1] = second, d[i][2] = third, d[i][3] = last;
  }
}

// A' m A: the 2x2 outputs of a tile.
static inline void transform_output(const Vec (&m)[4][4], Vec (&y)[2][2]) {
  Vec t[2][4];
  for (int i = 0; i < 4; ++i) {
    t[0][i] = m[0][i] + m[1][i] + m[2][i];
    t[1][i] = m[1][i] - m[2][i] - m[3][i];
  }
  for (int i = 0; i < 2; ++i) {
    y[i][0] = t[i][0] + t[i][1] + t[i][2];
    y[i][1] = t[i][1] - t[i][2] - t[i][3];
  }
}

// A dy A'
static inline void transform_gradient(const Vec (&dy)[2][2], Vec (&m)[4][4]) {
  for (int i = 0; i < 4; ++i) {
    Vec t[2];
    for (int j = 0; j < 2; ++j) {
      t[j] = i == 0 ? dy[0][j] : i == 1 ? dy[0][j] + dy[1][j] : i == 2 ? dy[0][j] - dy[1][j] : -dy[1][j];
    }
    m[i][0] = t[0], m[i][1] = t[0] + t[1], m[i][2] = t[0] - t[1], m[i][3] = -t[1];
  }
}

// Where the tiles of a map lie. Tiles at the same height make a line; with a dilation, they lie between each other.
struct TileGrid {
  int64_t batch, height, width, dilation, phase_rows, phase_columns, tile_rows, tile_columns;

  TileGrid(const int64_t *shape, int64_t dilation)
      : batch(shape[0]), height(shape[2]), width(shape[3]), dilation(dilation), phase_rows(std::min(dilation, height)),
        phase_columns(std::min(dilation, width)), tile_rows(((height + dilation - 1) / dilation + 1) / 2),
        tile_columns(((width + dilation - 1) / dilation + 1) / 2) {}

  int64_t line_length() const { return phase_columns * tile_columns; }
  int64_t lines_of_image() const { return phase_rows * tile_rows; }
  int64_t lines() const { return batch * lines_of_image(); }
  int64_t image(int64_t line) const { return line / lines_of_image(); }
  int64_t top(int64_t line) const {  // row of the first outputs
    const int64_t i = line % lines_of_image();
    return i / tile_rows + i % tile_rows * 2 * dilation;
  }
  int64_t left(int64_t i) const { return i / tile_columns + i % tile_columns * 2 * dilation; }
};

// A vector of tiles: without a dilation, pieces of lines, one after the other.
class TileVector {
 public:
  // Tiles from number `first` on, of maps x that become maps y.
  void set(const TileGrid &grid, int64_t first, const FeatureMaps &x, const FeatureMaps &y) {
    const int64_t length = grid.line_length(), tiles = grid.lines() * length;
    pieces_ = 0;
    for (int lane = 0; lane < kLanes && first + lane < tiles && grid.dilation == 1;) {
      const int64_t line = (first + lane) / length, i = (first + lane) % length;
      Piece &piece = piece_[pieces_++];
      piece = Piece{};
      for (int r = 0; r < 4; ++r) {
        const int64_t row = grid.top(line) + r - 1;
        piece.sees[r] = row >= 0 && row < grid.height;
        piece.inputs[r] = grid.image(line) * x.step() + row * grid.width + grid.left(i) - 1 - 2 * lane;
        if (r == 0 || r == 3) continue;
        piece.outputs[r - 1] = grid.image(line) * y.step() + row * grid.width + grid.left(i) - 2 * lane;
      }
      const int last = static_cast<int>(std::min<int64_t>(kLanes, lane + length - i));
      for (int64_t left = grid.left(i); lane < last; ++lane, left += 2) {
        for (int64_t column = left; column < left + 2; ++column) {
          const uint32_t bit = 1u << (2 * lane + column - left);
          if (column > 0) piece.first |= bit;
          if (column + 1 < grid.width) piece.second |= bit;
          if (column < grid.width) piece.written |= bit;
        }
      }
    }
    if (grid.dilation == 1) return;
    const auto place = [&](const FeatureMaps &maps, int lane, int64_t r, int64_t c) -> int64_t {
      const int64_t line = (first + lane) / length, i = (first + lane) % length;
      if (line >= grid.lines()) return -1;
      const int64_t row = grid.top(line) + r * grid.dilation, column = grid.left(i) + c * grid.dilation;
      if (row < 0 || row >= grid.height || column < 0 || column >= grid.width) return -1;
      return grid.image(line) * maps.step() + row * grid.width + column;
    };
    for (int r = 0; r < 4; ++r) {
      for (int c = 0; c < 4; ++c) {
        for (int lane = 0; lane < kLanes; ++lane) {
          inputs_[r][c][lane] = place(x, lane, r - 1, c - 1);
          if (r < 2 && c < 2) outputs_[r][c][lane] = place(y, lane, r, c);
        }
      }
    }
  }

  // The 4x4 inputs that the tiles see, of a channel's maps.
  void load_inputs(const float *maps, Vec (&d)[4][4]) const {
    for (int r = 0; r < 4; ++r) {
      if (pieces_) {
        load_row(maps, r, d[r]);
        continue;
      }
      for (int c = 0; c < 4; ++c) {
        float values[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          values[lane] = inputs_[r][c][lane] < 0 ? 0 : maps[inputs_[r][c][lane]];
        }
        d[r][c] = load(values);
      }
    }
  }

  void store_outputs(float *maps, const Vec (&values)[2][2]) const {
    for (int r = 0; r < 2; ++r) {
      if (pieces_) {
        store_row(maps, r, values[r]);
        continue;
      }
      for (int c = 0; c < 2; ++c) {
        for (int lane = 0; lane < kLanes; ++lane) {
          if (outputs_[r][c][lane] >= 0) maps[outputs_[r][c][lane]] = values[r][c][lane];
        }
      }
    }
  }

 private:
  // Tiles of one line. `inputs`, `outputs`: places in a channel's maps at which a vector's first tile would begin, were
  // it of this line. Two bits a lane: whether the first two columns, and the second two, of what a tile sees are there,
  // and which outputs are.
  struct Piece {
    int64_t inputs[4], outputs[2];
    bool sees[4];  // whether the row is there
    uint32_t first, second, written;
  };

  void load_row(const float *maps, int r, Vec (&d)[4]) const {
    Vec first[2] = {}, second[2] = {};  // the columns of all tiles in turn
    for (int i = 0; i < pieces_; ++i) {
      const Piece &piece = piece_[i];
      if (!piece.sees[r]) continue;
      for (int half = 0; half < 2; ++half) {
        const float *from = maps + piece.inputs[r] + half * kLanes;
        first[half] = load_where(first[half], piece.first >> (half * kLanes), from);
        second[half] = load_where(second[half], piece.second >> (half * kLanes), from + 2);
      }
    }
    d[0] = every_second<0>(first[0], first[1]), d[1] = every_second<1>(first[0], first[1]);
    d[2] = every_second<0>(second[0], second[1]), d[3] = every_second<1>(second[0], second[1]);
  }

  void store_row(float *maps, int r, const Vec (&values)[2]) const {
    Vec halves[2];
    in_turn(values[0], values[1], halves);
    for (int i = 0; i < pieces_; ++i) {
      const Piece &piece = piece_[i];
      if (!piece.sees[r + 1]) continue;
      for (int half = 0; half < 2; ++half) {
        store_where(maps + piece.outputs[r] + half * kLanes, piece.written >> (half * kLanes), halves[half]);
      }
    }
  }

  int pieces_;
  Piece piece_[kLanes];
  int64_t inputs_[4][4][kLanes], outputs_[2][2][kLanes];  // with a dilation: places in a channel's maps; -1: none
};

// G g G' of all kernels: for each kBlockRows outputs and each place a matrix, packed as by PackedMatrix.
struct TransformedWeight {
  int64_t rows, depth;
  Workspace workspace;

  // weight(row, k, tap)
  template <typename Weight>
  TransformedWeight(int64_t rows, int64_t depth, Weight weight)
      : rows(rows), depth(depth), workspace(Slot::kPackedWeight, blocks() * kPlaces * place_size()) {
    parallel_for(blocks(), rows * depth * kPlaces, [&](int64_t block) {
      float *to = workspace.data() + block * kPlaces * place_size();
      const int64_t first = block * kBlockRows, used = std::min<int64_t>(kBlockRows, rows - first);
      constexpr int64_t kStep = kLanes / kBlockRows;  // so many channels are one vector
      for (int64_t k = 0; k < depth; k += kStep, to += kStep * kBlockRows) {
        const int64_t count = std::min(kStep, depth - k);
        float g[kTaps][kLanes] = {};
        for (int64_t j = 0; j < count; ++j) {
          for (int64_t i = 0; i < used; ++i) {
            for (int tap = 0; tap < kTaps; ++tap) g[tap][j * kBlockRows + i] = weight(first + i, k + j, tap);
          }
        }
        Vec s[4][3];  // G g
        for (int c = 0; c < 3; ++c) {
          const Vec top = load(g[c]), middle = load(g[3 + c]), bottom = load(g[6 + c]), outer = top + bottom;
          s[0][c] = top, s[1][c] = 0.5f * (outer + middle), s[2][c] = 0.5f * (outer - middle), s[3][c] = bottom;
        }
        for (int r = 0; r < 4; ++r) {
          const Vec outer = s[r][0] + s[r][2];
          const Vec values[4] = {s[r][0], 0.5f * (outer + s[r][1]), 0.5f * (outer - s[r][1]), s[r][2]};
          for (int c = 0; c < 4; ++c) {
            store_some(to + (4 * r + c) * place_size(), values[c], static_cast<int>(count * kBlockRows));
          }
        }
      }
    });
  }

  int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  int64_t place_size() const { return depth * kBlockRows + kGap; }
  const float *block(int64_t block, int place) const {
    return workspace.data() + (block * kPlaces + place) * place_size();
  }
};

// Convolves maps x with a weight; epilogue(channel, vector) takes each vector of y's before it is written.
template <typename Epilogue>
static void convolve(const TransformedWeight &weight, const TileGrid &grid, const FeatureMaps &x, const FeatureMaps &y,
                     Epilogue epilogue) {
  const int64_t columns = grid.lines() * grid.line_length();
  const int64_t tile_blocks = (columns + kBlockTiles - 1) / kBlockTiles, blocks = weight.blocks();
  // The rows in parts, where tiles alone do not keep the threads busy.
  const int64_t parts = std::min(blocks, std::max<int64_t>(1, mindska_threads() / tile_blocks));
  const int64_t depth_block = std::min(weight.depth, kDepthBlock), sums_size = kPlaces * kBlockRows * kBlockTiles;
  parallel(tile_blocks * parts, weight.rows * weight.depth * columns / kLanes, [&](Tasks &tasks) {
    const Workspace transformed(Slot::kPackedColumns, kPlaces * (depth_block * kBlockTiles + kGap));
    const Workspace accumulator(Slot::kAccumulator, (weight.depth > kDepthBlock ? blocks : 1) * sums_size);
    for (const int64_t task : tasks) {
      const int64_t first = task / parts * kBlockTiles, first_block = task % parts * blocks / parts;
      const int64_t last_block = (task % parts + 1) * blocks / parts;
      const int vectors = static_cast<int>((std::min<int64_t>(kBlockTiles, columns - first) + kLanes - 1) / kLanes);
      TileVector tiles[kBlockTiles / kLanes];
      for (int v = 0; v < vectors; ++v) tiles[v].set(grid, first + v * kLanes, x, y);
      for (int64_t start = 0; start < weight.depth; start += kDepthBlock) {
        const int64_t depth = std::min(kDepthBlock, weight.depth - start);
        // For each place, panels as `multiply_panel` reads them.
        const auto panel = [&](int place, int v) {
          return transformed.data() + (place * vectors + v) * kLanes * depth + place * kGap;
        };
        for (int v = 0; v < vectors; ++v) {
          const int panel_first = v / kBlockVectors * kBlockVectors;
          const int64_t stride = std::min(kBlockVectors, vectors - panel_first) * kLanes;
          for (int64_t k = 0; k < depth; ++k) {
            Vec d[4][4];
            tiles[v].load_inputs(x.row(start + k), d);
            transform_input(d);
            for (int place = 0; place < kPlaces; ++place) {
              store(panel(place, panel_first) + k * stride + (v - panel_first) * kLanes, d[place / 4][place % 4]);
            }
          }
        }
        for (int64_t block = first_block; block < last_block; ++block) {
          float *sums = accumulator.data() + (weight.depth > kDepthBlock ? block * sums_size : 0);
          const auto at = [&](int place, int i, int v) { return sums + ((place * kBlockRows + i) * 3 + v) * kLanes; };
          for (int place = 0; place < kPlaces; ++place) {
            const PackedBlock left{weight.block(block, place) + start * kBlockRows};
            for (int v = 0; v < vectors; v += kBlockVectors) {
              multiply_panel(depth, left, panel(place, v), std::min(kBlockVectors, vectors - v),
                             [&](int i, int j, Vec value) {
                               float *sum = at(place, i, v + j);
                               store(sum, start ? load(sum) + value : value);
                             });
            }
          }
          if (start + depth < weight.depth) continue;
          for (int64_t i = 0; i < std::min<int64_t>(kBlockRows, weight.rows - block * kBlockRows); ++i) {
            for (int v = 0; v < vectors; ++v) {
              Vec m[4][4], values[2][2];
              for (int place = 0; place < kPlaces; ++place) {
                m[place / 4][place % 4] = load(at(place, static_cast<int>(i), v));
              }
              transform_output(m, values);
              for (int c = 0; c < 4; ++c) values[c / 2][c % 2] = epilogue(block * kBlockRows + i, values[c / 2][c % 2]);
              tiles[v].store_outputs(y.row(block * kBlockRows + i), values);
            }
          }
        }
      }
    }
  });
}

// Some lines of tiles, or part of one, with 16 channels of what they see, a vector a pixel.
class PixelVectors {
 public:
  // `rows` lines of pixels a tile, `before` of them above it; as many columns. Tiles [first, last).
  PixelVectors(const TileGrid &grid, int rows, int before, int64_t first, int64_t last)
      : grid_(grid), rows_(rows), before_(before), first_line_(first / grid.line_length()),
        last_line_((last - 1) / grid.line_length()), is_part_(first_line_ == last_line_ && grid.dilation == 1),
        begin_(is_part_ ? std::max<int64_t>(0, column(grid.left(first % grid.line_length()), 0)) : 0),
        end_(!is_part_ ? grid.width
                       : std::min(grid.width, column(grid.left((last - 1) % grid.line_length()), rows - 1) + 1)),
        workspace_(Slot::kPixelVectors, (last_line_ - first_line_ + 1) * rows * (end_ - begin_) * kLanes) {}

  // Channels [channel, channel + count) of the maps.
  void load_channels(const FeatureMaps &maps, int64_t channel, int count) {
    for (int64_t line = first_line_; line <= last_line_; ++line) {
      for (int r = 0; r < rows_; ++r) {
        const int64_t y = row(line, r);
        if (y < 0 || y >= grid_.height) continue;
        const float *from = maps.row(channel) + grid_.image(line) * maps.step() + y * grid_.width;
        for (int64_t x = begin_; x < end_; x += kLanes) {
          const int pixels = static_cast<int>(std::min<int64_t>(kLanes, end_ - x));
          Vec block[kLanes] = {};
          for (int i = 0; i < count; ++i) block[i] = load_some(from + i * maps.pixels + x, pixels);
          transpose(block);
          for (int i = 0; i < pixels; ++i) store(at(line, r, x + i), block[i]);
        }
      }
    }
  }

  // What a tile sees.
  template <int N>
  void tile(int64_t index, Vec (&d)[N][N]) const {
    const int64_t line = index / grid_.line_length(), left = grid_.left(index % grid_.line_length());
    for (int r = 0; r < N; ++r) {
      const int64_t y = row(line, r);
      for (int c = 0; c < N; ++c) {
        const int64_t x = column(left, c);
        d[r][c] = y >= 0 && y < grid_.height && x >= 0 && x < grid_.width ? load(at(line, r, x)) : Vec{};
      }
    }
  }

 private:
  int64_t row(int64_t line, int r) const { return grid_.top(line) + (r - before_) * grid_.dilation; }
  int64_t column(int64_t left, int c) const { return left + (c - before_) * grid_.dilation; }
  float *at(int64_t line, int r, int64_t x) const {
    return workspace_.data() + (((line - first_line_) * rows_ + r) * (end_ - begin_) + x - begin_) * kLanes;
  }

  const TileGrid &grid_;
  const int rows_, before_;
  const int64_t first_line_, last_line_;
  const bool is_part_;           // of one line: not all columns are needed
  const int64_t begin_, end_;  // columns
  const Workspace workspace_;
};

// A block of rows that lie in vectors: that of row i and column k is at k * kLanes + i.
struct VectorBlock {
  const float *data;

  float operator()(int i, int64_t k) const { return data[k * kLanes + i]; }
  VectorBlock from(int64_t k) const { return {data + k * kLanes}; }
};

// A part of the gradient of the weight: outputs [first, last), input channels [from, to).
static void weight_gradient(const TileGrid &grid, const FeatureMaps &x, const FeatureMaps &dy, int64_t first,
                            int64_t last, int64_t from, int64_t to, float *dweight) {
  const int64_t row_blocks = (last - first + kBlockRows - 1) / kBlockRows;
  const int vectors = static_cast<int>((to - from + kLanes - 1) / kLanes);
  const int64_t row_vectors = (last - first + kVectorRows - 1) / kVectorRows;
  const int64_t sums_size = kPlaces * row_blocks * kBlockRows * vectors * kLanes;
  const Workspace inputs(Slot::kPackedColumns, kPlaces * (vectors * kLanes * kChunkTiles + kGap));
  const Workspace gradients(Slot::kHiddenGradient, kPlaces * (row_vectors * kLanes * kChunkTiles + kGap));
  const Workspace accumulator(Slot::kAccumulator, sums_size);
  float *sums = accumulator.data();
  std::fill(sums, sums + sums_size, 0.0f);
  const int64_t tiles = grid.lines() * grid.line_length();
  for (int64_t start = 0; start < tiles; start += kChunkTiles) {
    const int64_t count = std::min(kChunkTiles, tiles - start);
    const auto panel = [&](int place, int v) {
      return inputs.data() + (place * vectors + v) * kLanes * count + place * kGap;
    };
    const auto rows = [&](int place, int64_t v) {
      return gradients.data() + (place * row_vectors + v) * kLanes * count + place * kGap;
    };
    {
      PixelVectors pixels(grid, 4, 1, start, start + count);
      for (int v = 0; v < vectors; ++v) {
        const int panel_first = v / kBlockVectors * kBlockVectors;
        const int64_t stride = std::min(kBlockVectors, vectors - panel_first) * kLanes;
        pixels.load_channels(x, from + v * kLanes, static_cast<int>(std::min<int64_t>(kLanes, to - from - v * kLanes)));
        for (int64_t t = 0; t < count; ++t) {
          Vec d[4][4];
          pixels.tile(start + t, d);
          transform_input(d);
          for (int place = 0; place < kPlaces; ++place) {
            store(panel(place, panel_first) + t * stride + (v - panel_first) * kLanes, d[place / 4][place % 4]);
          }
        }
      }
    }
    {
      PixelVectors pixels(grid, 2, 0, start, start + count);
      for (int64_t v = 0; v < row_vectors; ++v) {
        const int64_t channel = first + v * kVectorRows;
        pixels.load_channels(dy, channel, static_cast<int>(std::min(kVectorRows, last - channel)));
        for (int64_t t = 0; t < count; ++t) {
          Vec d[2][2], m[4][4];
          pixels.tile(start + t, d);
          transform_gradient(d, m);
          for (int place = 0; place < kPlaces; ++place) store(rows(place, v) + t * kLanes, m[place / 4][place % 4]);
        }
      }
    }
    for (int place = 0; place < kPlaces; ++place) {
      for (int v = 0; v < vectors; v += kBlockVectors) {
        for (int64_t block = 0; block < row_blocks; ++block) {
          float *part = sums + ((place * row_blocks + block) * kBlockRows * vectors + v) * kLanes;
          const int64_t row = block * kBlockRows;
          const VectorBlock left{rows(place, row / kVectorRows) + row % kVectorRows};
          multiply_panel(count, left, panel(place, v), std::min(kBlockVectors, vectors - v),
                         [&](int i, int j, Vec value) {
                           float *sum = part + (i * vectors + j) * kLanes;
                           store(sum, load(sum) + value);
                         });
        }
      }
    }
  }
  for (int64_t row = 0; row < last - first; ++row) {
    for (int v = 0; v < vectors; ++v) {
      Vec s[3][4], g[3][3];  // s: G' times the sums
      for (int c = 0; c < 4; ++c) {
        const auto at = [&](int r) {
          return load(sums + (((r * 4 + c) * row_blocks * kBlockRows + row) * vectors + v) * kLanes);
        };
        const Vec sum = 0.5f * (at(1) + at(2));
        s[0][c] = at(0) + sum, s[1][c] = 0.5f * (at(1) - at(2)), s[2][c] = sum + at(3);
      }
      for (int r = 0; r < 3; ++r) {
        const Vec sum = 0.5f * (s[r][1] + s[r][2]);
        g[r][0] = s[r][0] + sum, g[r][1] = 0.5f * (s[r][1] - s[r][2]), g[r][2] = sum + s[r][3];
      }
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, to - from - v * kLanes); ++i) {
        float *kernel = dweight + ((first + row) * x.channels + from + v * kLanes + i) * kTaps;
        for (int tap = 0; tap < kTaps; ++tap) kernel[tap] = g[tap / 3][tap % 3][i];
      }
    }
  }
}

}  // namespace mindska

// y = convolution + bias, and ReLU of it where relu is 1
MINDSKA_OPERATOR(mindska_winograd,
                 "x (B, C, H, W), weight (O, C, 3, 3), bias (O), options {dilation, relu} -> y (B, O, H, W) "
                 "where dilation >= 1, dilation <= 1024") {
  using namespace mindska;
  const float *w = static_cast<float *>(params[1]), *bias = static_cast<float *>(params[2]);
  const int32_t *options = static_cast<int32_t *>(params[3]);
  const int64_t outputs = shapes[1][0], channels = shapes[1][1];
  const TransformedWeight weight(outputs, channels, [=](int64_t row, int64_t k, int tap) {
    return w[(row * channels + k) * kTaps + tap];
  });
  const bool with_relu = options[1];
  convolve(weight, TileGrid(shapes[0], options[0]), FeatureMaps(params[0], shapes[0]),
           FeatureMaps(params[4], shapes[4]),
           [=](int64_t row, Vec value) { return with_relu ? relu(value + bias[row]) : value + bias[row]; });
  return 0;
}

// dy: the gradient of the ReLU's input.
MINDSKA_OPERATOR(mindska_winograd_input_grad,
                 "weight (O, C, 3, 3), options {dilation, relu}, dy (B, O, H, W) -> dx (B, C, H, W) "
                 "where dilation >= 1, dilation <= 1024") {
  using namespace mindska;
  const float *w = static_cast<float *>(params[0]);
  const int64_t outputs = shapes[0][0], channels = shapes[0][1];
  const TransformedWeight weight(channels, outputs, [=](int64_t row, int64_t k, int tap) {
    return w[(k * channels + row) * kTaps + kTaps - 1 - tap];
  });
  convolve(weight, TileGrid(shapes[2], *static_cast<int32_t *>(params[1])), FeatureMaps(params[2], shapes[2]),
           FeatureMaps(params[3], shapes[3]), [](int64_t, Vec value) { return value; });
  return 0;
}

// dy: the gradient of the ReLU's input.
MINDSKA_OPERATOR(mindska_winograd_weight_grad,
                 "x (B, C, H, W), options {dilation, relu}, dy (B, O, H, W) -> dweight (O, C, 3, 3), dbias (O) "
                 "where dilation >= 1, dilation <= 1024") {
  using namespace mindska;
  const FeatureMaps x(params[0], shapes[0]), dy(params[2], shapes[2]);
  const TileGrid grid(shapes[0], *static_cast<int32_t *>(params[1]));
  float *dweight = static_cast<float *>(params[3]), *dbias = static_cast<float *>(params[4]);
  int64_t rows = kGradRows, columns = kGradColumns;
  const auto row_parts = [&] { return (dy.channels + rows - 1) / rows; };
  const auto column_parts = [&] { return (x.channels + columns - 1) / columns; };
  while (row_parts() * column_parts() < mindska_threads() && rows > kVectorRows) {  // smaller parts, to keep all busy
    columns > kPanelColumns ? columns = kPanelColumns : rows = kVectorRows;
  }
  parallel_for(row_parts() * column_parts(), kAlwaysParallel, [&](int64_t task) {
    const int64_t first = task / column_parts() * rows, from = task % column_parts() * columns;
    weight_gradient(grid, x, dy, first, std::min(first + rows, dy.channels), from, std::min(from + columns, x.channels),
                    dweight);
  });
  parallel_for(dy.channels, dy.channels * dy.columns(), [&](int64_t channel) {
    float total = 0;
    for (int64_t image = 0; image < dy.batch; ++image) total += sum_of(dy.row(channel) + image * dy.step(), dy.pixels);
    dbias[channel] = total;
  });
  return 0;
}
