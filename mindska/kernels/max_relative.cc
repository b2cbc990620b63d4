// The max-relative graph aggregation in one pass: distances, the nearest nodes, and the maximum over them.
//
// Features stay in the layout of feature maps, (C, N), and sixteen queries go through everything together, one a lane: the
// matrix product of a block of queries with all keys, whose results are ranked at once and never written out, and the
// maximum over the chosen keys. A query's closeness to a key is 2 x.y - |y|^2 - position, of L2-normalised features; the
// higher, the nearer.
#include "simd.h"

namespace mindska {

#ifdef __AVX512F__
constexpr int kBlockKeys = 12;  // keys whose products with a block of queries stay in registers
#else
constexpr int kBlockKeys = 4;
#endif
constexpr int kBlockQueries = kLanes;             // queries, one a lane
constexpr int kTileQueries = 4 * kBlockQueries;  // queries that are read and written together: whole lines of the cache
constexpr float kMinLength = 1e-12f;              // of a vector that is normalized, as in PyTorch

// Multiplies every column of (C, N) by 1 / max(its length, 1e-12), times `factor`; returns the squared lengths after it.
static void normalize(const float *from, int64_t channels, int64_t count, int64_t from_stride, float *to,
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
    length = length < splat(kMinLength) ? splat(kMinLength) : length;
    Vec square = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load_some(from + c * from_stride + i, lanes) / length;
      square += v * v;
      store(to + c * to_stride + i, v * factor);
    }
    if (squares) store(squares + i, square);
  }
}

// The largest values that each lane has seen, the largest first, and their indices; of equal ones the first seen. NaN
// never gets in.
struct Ranking {
  std::vector<Vec> values;
  std::vector<IntVec> indices;

  explicit Ranking(int64_t count) : values(count), indices(count) {}

  void clear() {
    for (size_t j = 0; j < values.size(); ++j) {
      values[j] = splat(-INFINITY);
      indices[j] = IntVec{} + static_cast<int32_t>(j);
    }
  }

  void add(Vec value, int32_t index) {
    IntVec at = IntVec{} + index, shifted = {};
    for (size_t j = 0; j < values.size(); ++j) {
      shifted |= value > values[j];  // from where it belongs, all move down by one
      const Vec other = values[j];
      const IntVec place = indices[j];
      values[j] = shifted ? value : other;
      indices[j] = shifted ? at : place;
      value = shifted ? other : value;
      at = shifted ? place : at;
    }
  }
};

// Ranks all keys by their closeness to a block of queries: x (C, kBlockQueries), y (C, stride), offset (stride,), and the
// position map (M, N), of which the block's columns begin at `position`.
static void rank_keys(const float *x, const float *y, const float *offset, const float *position,
                      int64_t position_stride, int64_t channels, int64_t keys, int64_t stride, int lanes,
                      Ranking *ranking) {
  ranking->clear();
  for (int64_t m = 0; m < keys; m += kBlockKeys) {
    Vec sums[kBlockKeys] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec query = load(x + c * kBlockQueries);
      const float *key = y + c * stride + m;
      for (int i = 0; i < kBlockKeys; ++i) sums[i] += query * key[i];
    }
    for (int i = 0; i < kBlockKeys && m + i < keys; ++i) {
      const Vec place = load_some(position + (m + i) * position_stride, lanes);
      ranking->add(sums[i] - (place + offset[m + i]), static_cast<int32_t>(m + i));
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
      : batch(x[0]), channels(x[1]), queries(element_count(x + 2, xdim - 2)), keys(element_count(y + 2, ydim - 2)),
        neighbours(options[0]), step(std::min<int64_t>(options[1], keys / neighbours)),
        stride(round_up(keys, kLanes) + kBlockKeys), width(round_up(channels, kLanes)) {}
};

}  // namespace mindska

// The dilation shrinks to what fits. z: x_0, d_0, x_1, d_1, ... with d the maximum of the neighbours minus x. index: the
// neighbours.
MINDSKA_OPERATOR(mindska_max_relative,
                 "x (B, C, H, W), y (B, C, h, w), position (h * w, H * W), options {k, dilation} "
                 "-> z (B, 2 * C, H, W), index (B, H * W, k) int32 "
                 "where k >= 1, dilation >= 1, k <= h * w, h * w <= 2147483647") {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *y = static_cast<float *>(params[1]);
  const float *position = static_cast<float *>(params[2]);
  float *z = static_cast<float *>(params[4]);
  int32_t *index = static_cast<int32_t *>(params[5]);
  const Sizes s(shapes[0], ndims[0], shapes[1], ndims[1], static_cast<int32_t *>(params[3]));
  const int64_t blocks = (s.queries + kTileQueries - 1) / kTileQueries;
  std::vector<float> directions(s.batch * s.channels * s.stride), offsets(s.batch * s.stride);
  std::vector<float> rows(s.batch * s.keys * s.width);
  parallel_for(s.batch, kAlwaysParallel, [&](int64_t b) {
    const float *keys = y + b * s.channels * s.keys;
    normalize(keys, s.channels, s.keys, s.keys, directions.data() + b * s.channels * s.stride, s.stride, 1,
              offsets.data() + b * s.stride);
    transpose_keys(keys, s.channels, s.keys, s.width, rows.data() + b * s.keys * s.width);
  });
  parallel(s.batch * blocks, kAlwaysParallel, [&](Tasks &tasks) {
    std::vector<float> features(s.channels * kTileQueries), query(s.channels * kBlockQueries);
    std::vector<float> maxima(kTileQueries * s.width);
    Ranking ranking(s.neighbours * s.step);
    for (const int64_t block : tasks) {
      const int64_t b = block / blocks, first = block % blocks * kTileQueries;
      const int64_t count = std::min<int64_t>(kTileQueries, s.queries - first);
      const float *from = x + b * s.channels * s.queries + first;
      for (int64_t c = 0; c < s.channels; ++c) {
        std::memcpy(features.data() + c * kTileQueries, from + c * s.queries, count * sizeof(float));
      }
      for (int64_t start = 0; start < count; start += kBlockQueries) {
        const int lanes = static_cast<int>(std::min<int64_t>(kBlockQueries, count - start));
        normalize(features.data() + start, s.channels, lanes, kTileQueries, query.data(), kBlockQueries, 2, nullptr);
        rank_keys(query.data(), directions.data() + b * s.channels * s.stride, offsets.data() + b * s.stride,
             position + first + start, s.queries, s.channels, s.keys, s.stride, lanes, &ranking);
        for (int q = 0; q < lanes; ++q) {
          int32_t *chosen = index + (b * s.queries + first + start + q) * s.neighbours;
          for (int64_t j = 0; j < s.neighbours; ++j) chosen[j] = ranking.indices[j * s.step][q];
          for (int64_t c = 0; c < s.width; c += kLanes) {
            const float *key = rows.data() + b * s.keys * s.width + c;
            Vec largest = load(key + chosen[0] * s.width);
            for (int64_t j = 1; j < s.neighbours; ++j) {
              const Vec other = load(key + chosen[j] * s.width);
              largest = largest >= other || largest != largest ? largest : other;  // NaN stays
            }
            store(maxima.data() + (start + q) * s.width + c, largest);
          }
        }
      }
      float *to = z + b * 2 * s.channels * s.queries + first;
      for (int64_t c = 0; c < s.channels; ++c) {
        const float *x_tile = features.data() + c * kTileQueries;
        float *relative = to + (2 * c + 1) * s.queries;
        std::memcpy(to + 2 * c * s.queries, x_tile, count * sizeof(float));
        for (int64_t q = 0; q < count; ++q) relative[q] = maxima[q * s.width + c] - x_tile[q];
      }
    }
  });
  return 0;
}

// Of equal neighbours the first gets the gradient.
MINDSKA_OPERATOR(mindska_max_relative_grad,
                 "y (B, C, h, w), index (B, N, k) int32, dz (B, 2 * C, H, W), options {k, dilation} "
                 "-> dx (B, C, H, W), dy (B, C, h, w) "
                 "where N == H * W, k >= 1, dilation >= 1, k <= h * w, h * w <= 2147483647") {
  using namespace mindska;
  const float *y = static_cast<float *>(params[0]), *dz = static_cast<float *>(params[2]);
  const int32_t *index = static_cast<int32_t *>(params[1]);
  float *dx = static_cast<float *>(params[4]), *dy = static_cast<float *>(params[5]);
  const Sizes s(shapes[4], ndims[4], shapes[0], ndims[0], static_cast<int32_t *>(params[3]));
  const int64_t groups = s.width / kLanes;
  const bool are_keys = std::all_of(index, index + s.batch * s.queries * s.neighbours,
                                    [&](int32_t i) { return i >= 0 && i < s.keys; });
  if (!are_keys) throw Refused("an index is not that of a node", kWrongValue);
  parallel(s.batch * groups, kAlwaysParallel, [&](Tasks &tasks) {
    std::vector<float> rows(s.keys * kLanes), gradient(s.keys * kLanes), block(kBlockQueries * kLanes);
    for (const int64_t part : tasks) {
      const int64_t b = part / groups, first = part % groups * kLanes;
      const int64_t channels = std::min<int64_t>(kLanes, s.channels - first);
      transpose_keys(y + (b * s.channels + first) * s.keys, channels, s.keys, kLanes, rows.data());
      std::fill(gradient.begin(), gradient.end(), 0.0f);
      std::fill(block.begin(), block.end(), 0.0f);
      for (int64_t start = 0; start < s.queries; start += kBlockQueries) {
        const int64_t count = std::min<int64_t>(kBlockQueries, s.queries - start);
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
          Vec largest = load(rows.data() + chosen[0] * kLanes);
          IntVec argmax = {};
          for (int64_t j = 1; j < s.neighbours; ++j) {
            const Vec other = load(rows.data() + chosen[j] * kLanes);
            const IntVec stays = largest >= other || largest != largest;  // NaN stays
            largest = stays ? largest : other;
            argmax = stays ? argmax : IntVec{} + static_cast<int32_t>(j);
          }
          const Vec d = load(block.data() + q * kLanes);
          for (int64_t j = 0; j < s.neighbours; ++j) {
            float *at = gradient.data() + chosen[j] * kLanes;
            store(at, load(at) + (argmax == static_cast<int32_t>(j) ? d : Vec{}));
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        float *out = dy + (b * s.channels + first + c) * s.keys;
        for (int64_t m = 0; m < s.keys; ++m) out[m] = gradient[m * kLanes + c];
      }
    }
  });
  return 0;
}
