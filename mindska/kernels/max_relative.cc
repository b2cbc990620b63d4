// The max-relative graph aggregation in one pass: distances, the nearest nodes, and the maximum over them.
//
// Features stay in the layout of the maps, (C, N): a tile of queries against all keys is a small matrix product whose
// result is ranked at once and never written out. A query's closeness to a key is 2 x.y - |y|^2 - position, of
// L2-normalised features; the higher, the nearer.
#include "simd.h"

namespace mindska {

#ifdef __AVX512F__
constexpr int kRows = 8, kColumns = 2;  // queries, and vectors of keys, whose products stay in registers
#else
constexpr int kRows = 4, kColumns = 1;
#endif
constexpr int kTile = kLanes;  // queries that a thread takes at once
constexpr float kSmallest = 1e-12f;

static inline int64_t rounded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Multiplies every column of (C, N) by 1 / max(its length, 1e-12), times `factor`; returns the squared lengths after it.
static void normalise(const float *from, int64_t channels, int64_t count, int64_t from_stride, float *to,
                      int64_t to_stride, float factor, float *squares) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    Vec total = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load_some(from + c * from_stride + i, lanes);
      total += v * v;
    }
    Vec length;
    for (int lane = 0; lane < kLanes; ++lane) length[lane] = std::sqrt(total[lane]);
    length = length < splat(kSmallest) ? splat(kSmallest) : length;
    Vec square = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load_some(from + c * from_stride + i, lanes) / length;
      square += v * v;
      store(to + c * to_stride + i, v * factor);
    }
    if (squares) store(squares + i, square);
  }
}

// closeness[q][m] = x[., q] . y[., m] - offset[m] - position[q][m] for kTile queries and all keys.
static void closeness_tile(const float *x, const float *y, const float *offset, const float *position, int64_t channels,
                           int64_t keys, int64_t stride, int64_t queries, float *out) {
  for (int64_t m = 0; m < stride; m += kColumns * kLanes) {
    for (int q = 0; q < kTile; q += kRows) {
      Vec sums[kRows][kColumns] = {};
      for (int64_t c = 0; c < channels; ++c) {
        Vec key[kColumns];
        for (int j = 0; j < kColumns; ++j) key[j] = load(y + c * stride + m + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vec query = splat(x[c * kTile + q + i]);
          for (int j = 0; j < kColumns; ++j) sums[i][j] += query * key[j];
        }
      }
      for (int i = 0; i < kRows && q + i < queries; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          const int64_t first = m + j * kLanes;
          if (first >= keys) break;
          const int lanes = static_cast<int>(std::min<int64_t>(kLanes, keys - first));
          const Vec place = load_some(position + (q + i) * keys + first, lanes);
          store_some(out + (q + i) * keys + first, sums[i][j] - (load(offset + first) + place), lanes);
        }
      }
    }
  }
}

// The indices of the `count` largest values, the largest first; of equal ones the first. NaN is never chosen.
static void largest(const float *values, int64_t size, int64_t count, float *best, int32_t *index) {
  for (int64_t j = 0; j < count; ++j) {
    best[j] = -INFINITY;
    index[j] = static_cast<int32_t>(j);
  }
  for (int64_t start = 0; start < size; start += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, size - start));
    const Vec v = lanes == kLanes ? load(values + start) : load_some(values + start, lanes);
    const IntVec above = v > splat(best[count - 1]);
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= above[i];
    if (!any) continue;
    for (int i = 0; i < lanes; ++i) {
      const float value = values[start + i];
      if (!(value > best[count - 1])) continue;
      int64_t j = count - 1;
      for (; j > 0 && value > best[j - 1]; --j) {
        best[j] = best[j - 1];
        index[j] = index[j - 1];
      }
      best[j] = value;
      index[j] = static_cast<int32_t>(start + i);
    }
  }
}

// (C, M) -> (M, padded C), zeros beyond C.
static void transpose_keys(const float *y, int64_t channels, int64_t keys, int64_t width, float *rows) {
  for (int64_t m = 0; m < keys; ++m) {
    for (int64_t c = 0; c < channels; ++c) rows[m * width + c] = y[c * keys + m];
    for (int64_t c = channels; c < width; ++c) rows[m * width + c] = 0;
  }
}

struct Sizes {
  int64_t batch, channels, queries, keys, neighbours, step, stride, width;

  Sizes(const int64_t *x, int xdim, const int64_t *y, int ydim, const int32_t *options)
      : batch(x[0]), channels(x[1]), queries(size_of(x + 2, xdim - 2)), keys(size_of(y + 2, ydim - 2)),
        neighbours(options[0]), step(std::min<int64_t>(options[1], keys / neighbours)), stride(rounded(keys, kColumns * kLanes)),
        width(rounded(channels, kLanes)) {}
};

}  // namespace mindska

// Inputs x (B, C, H, W), y (B, C, h, w), position (H W, h w), options (2,) int32: k and dilation (at most what fits).
// Outputs z (B, 2 C, H, W): x_0, d_0, x_1, d_1, ... with d the maximum of the neighbours minus x; index (B, H W, k) int32.
MINDSKA_OPERATOR(mindska_max_relative) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *y = static_cast<float *>(params[1]);
  const float *position = static_cast<float *>(params[2]);
  float *z = static_cast<float *>(params[4]);
  int32_t *index = static_cast<int32_t *>(params[5]);
  const Sizes s(shapes[0], ndims[0], shapes[1], ndims[1], static_cast<int32_t *>(params[3]));
  const int64_t ranked = s.neighbours * s.step;
  const int64_t tiles = (s.queries + kTile - 1) / kTile;
  std::vector<float> directions(s.batch * s.channels * s.stride), offsets(s.batch * s.stride);
  std::vector<float> rows(s.batch * s.keys * s.width);
#pragma omp parallel
  {
    std::vector<float> query(s.channels * kTile), closeness(kTile * s.keys), best(ranked), block(kTile * s.width);
    std::vector<int32_t> order(ranked);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      const float *keys = y + b * s.channels * s.keys;
      normalise(keys, s.channels, s.keys, s.keys, directions.data() + b * s.channels * s.stride, s.stride, 1,
                offsets.data() + b * s.stride);
      transpose_keys(keys, s.channels, s.keys, s.width, rows.data() + b * s.keys * s.width);
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < s.batch * tiles; ++tile) {
      const int64_t b = tile / tiles, first = tile % tiles * kTile;
      const int64_t count = std::min<int64_t>(kTile, s.queries - first);
      const float *from = x + b * s.channels * s.queries + first;
      float *to = z + b * 2 * s.channels * s.queries + first;
      const float *key_rows = rows.data() + b * s.keys * s.width;
      normalise(from, s.channels, count, s.queries, query.data(), kTile, 2, nullptr);
      closeness_tile(query.data(), directions.data() + b * s.channels * s.stride, offsets.data() + b * s.stride,
                     position + first * s.keys, s.channels, s.keys, s.stride, count, closeness.data());
      for (int64_t q = 0; q < count; ++q) {
        int32_t *chosen = index + ((b * s.queries) + first + q) * s.neighbours;
        largest(closeness.data() + q * s.keys, s.keys, ranked, best.data(), order.data());
        for (int64_t j = 0; j < s.neighbours; ++j) chosen[j] = order[j * s.step];
        for (int64_t c = 0; c < s.width; c += kLanes) {
          Vec most = load(key_rows + chosen[0] * s.width + c);
          for (int64_t j = 1; j < s.neighbours; ++j) {
            const Vec other = load(key_rows + chosen[j] * s.width + c);
            most = most >= other || most != most ? most : other;  // NaN stays
          }
          store(block.data() + q * s.width + c, most);
        }
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        float *same = to + 2 * c * s.queries, *relative = same + s.queries;
        for (int64_t q = 0; q < count; ++q) {
          const float own = from[c * s.queries + q];
          same[q] = own;
          relative[q] = block[q * s.width + c] - own;
        }
      }
    }
  }
  return 0;
}

// Inputs y, index, dz, options; outputs dx (B, C, H, W), dy (B, C, h, w). Of equal neighbours the first gets the gradient.
MINDSKA_OPERATOR(mindska_max_relative_grad) {
  using namespace mindska;
  const float *y = static_cast<float *>(params[0]), *dz = static_cast<float *>(params[2]);
  const int32_t *index = static_cast<int32_t *>(params[1]);
  float *dx = static_cast<float *>(params[4]), *dy = static_cast<float *>(params[5]);
  const Sizes s(shapes[4], ndims[4], shapes[0], ndims[0], static_cast<int32_t *>(params[3]));
  const int64_t groups = s.width / kLanes;
#pragma omp parallel
  {
    std::vector<float> rows(s.keys * kLanes), gradient(s.keys * kLanes), block(kTile * kLanes);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < s.batch * groups; ++part) {
      const int64_t b = part / groups, first = part % groups * kLanes;
      const int64_t channels = std::min<int64_t>(kLanes, s.channels - first);
      transpose_keys(y + (b * s.channels + first) * s.keys, channels, s.keys, kLanes, rows.data());
      std::fill(gradient.begin(), gradient.end(), 0.0f);
      std::fill(block.begin(), block.end(), 0.0f);
      for (int64_t start = 0; start < s.queries; start += kTile) {
        const int64_t count = std::min<int64_t>(kTile, s.queries - start);
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t channel = b * s.channels + first + c;
          const float *same = dz + 2 * channel * s.queries + start, *relative = same + s.queries;
          float *out = dx + channel * s.queries + start;
          for (int64_t q = 0; q < count; ++q) {
            out[q] = same[q] - relative[q];
            block[q * kLanes + c] = relative[q];
          }
        }
        for (int64_t q = 0; q < count; ++q) {
          const int32_t *chosen = index + (b * s.queries + start + q) * s.neighbours;
          Vec most = load(rows.data() + chosen[0] * kLanes);
          IntVec winner = {};
          for (int64_t j = 1; j < s.neighbours; ++j) {
            const Vec other = load(rows.data() + chosen[j] * kLanes);
            const IntVec keep = most >= other || most != most;
            most = keep ? most : other;
            winner = keep ? winner : IntVec{} + static_cast<int32_t>(j);
          }
          const Vec d = load(block.data() + q * kLanes);
          for (int64_t j = 0; j < s.neighbours; ++j) {
            float *at = gradient.data() + chosen[j] * kLanes;
            store(at, load(at) + (winner == static_cast<int32_t>(j) ? d : Vec{}));
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        float *out = dy + (b * s.channels + first + c) * s.keys;
        for (int64_t m = 0; m < s.keys; ++m) out[m] = gradient[m * kLanes + c];
      }
    }
  }
  return 0;
}
