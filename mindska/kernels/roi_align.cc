// RoIAlign, aligned and adaptive: a box is cut into bins, a bin is the mean of its samples (as many along an axis as it has
// cells, rounded up), a sample the bilinear value at its place.
//
// Both axes are apart, so that a box is two small matrices, rows (out, h) and columns (out, w) for the h x w cells that it
// touches: y = rows * map * columns^T, and the gradient of the map is rows^T * dy * columns. A thread takes some channels
// of an image for all of its boxes: their maps stay in the cache, and no two threads add to the same gradient.
#include "simd.h"

namespace mindska {

constexpr int kLevels = 4;
constexpr int kRowBlock = 7;           // rows of a result in registers
constexpr int64_t kChannelBlock = 8;  // channels that a thread takes at once

// The weights of a map's cells along one axis in the bins of a box.
struct BoxAxis {
  int64_t first = 0, cells = 0;     // of the map, that the box touches
  std::vector<float> weights;       // (out, cells)
  std::vector<int64_t> start, end;  // of each bin, the cells with weights

  // start, length: of the box in cells, half a cell taken off. `row` is (map).
  BoxAxis(float start_at, float length, int64_t out, int64_t map, std::vector<float> *dense) : start(out), end(out) {
    const float size = length / static_cast<float>(out);
    if (!(size > 0) || !std::isfinite(size) || !std::isfinite(start_at)) return;
    const float count = std::ceil(size), step = size / count, last = static_cast<float>(map);
    dense->assign(out * map, 0.0f);
    int64_t low_cell = map, high_cell = 0;
    for (int64_t bin = 0; bin < out; ++bin) {
      const float begin = start_at + static_cast<float>(bin) * size;
      float *row = dense->data() + bin * map;
      // Only samples near the map: the exact test follows.
      const float from = std::max(0.0f, std::floor((-1 - begin) / step) - 2);
      const float to = std::min(count, std::ceil((last - begin) / step) + 2);
      start[bin] = map;
      for (float i = from; i < to; ++i) {
        float place = begin + (i + 0.5f) * size / count;
        if (place < -1 || place > last) continue;
        place = std::max(place, 0.0f);
        const int64_t low = std::min(static_cast<int64_t>(place), map - 1), high = std::min(low + 1, map - 1);
        const float share = low == map - 1 ? 0.0f : place - static_cast<float>(low);
        row[low] += (1 - share) / count;
        row[high] += share / count;
        start[bin] = std::min(start[bin], low);
        end[bin] = std::max(end[bin], high + 1);
      }
      low_cell = std::min(low_cell, start[bin]);
      high_cell = std::max(high_cell, end[bin]);
    }
    if (low_cell >= high_cell) return;
    first = low_cell;
    cells = high_cell - low_cell;
    weights.resize(out * cells);
    for (int64_t bin = 0; bin < out; ++bin) {
      std::copy_n(dense->data() + bin * map + first, cells, weights.data() + bin * cells);
      start[bin] = std::max<int64_t>(0, std::min(start[bin], end[bin]) - first);
      end[bin] = std::max<int64_t>(start[bin], end[bin] - first);
    }
  }
};

// A box on its map, with the columns' weights as the loops read them.
struct Box {
  int level = -1;  // none: nothing to compute
  int64_t row = 0, rows = 0, column = 0, columns = 0;
  int64_t width = 0;      // columns in whole vectors, from `column` on
  int64_t skipped = 0;    // of these, columns before the first with weights
  bool is_narrow = true;  // the map is not so wide: its rows are copied
  std::vector<float> row_weights, column_weights, by_column;  // (out, rows), (out, width), (columns, lanes)
  std::vector<int64_t> start, end;

  Box() = default;

  Box(const float *roi, float scale, int64_t out, int64_t high, int64_t wide, std::vector<float> *dense) {
    const float x = roi[0] * scale - 0.5f, y = roi[1] * scale - 0.5f;
    BoxAxis vertical(y, (roi[3] * scale - 0.5f) - y, out, high, dense);
    BoxAxis horizontal(x, (roi[2] * scale - 0.5f) - x, out, wide, dense);
    if (!vertical.cells || !horizontal.cells) return;
    level = 0;
    row = vertical.first;
    rows = vertical.cells;
    row_weights = std::move(vertical.weights);
    start = std::move(vertical.start);
    end = std::move(vertical.end);
    columns = horizontal.cells;
    width = round_up(columns, kLanes);
    is_narrow = wide < width;
    column = is_narrow ? horizontal.first : std::min(horizontal.first, wide - width);
    skipped = horizontal.first - column;
    if (skipped + columns > width) throw Refused("a box is wider than its map", kFailed);
    const int64_t lanes = round_up(out, kLanes);
    column_weights.assign(out * width, 0.0f);
    by_column.assign(columns * lanes, 0.0f);
    for (int64_t bin = 0; bin < out; ++bin) {
      for (int64_t i = 0; i < columns; ++i) {
        const float weight = horizontal.weights[bin * columns + i];
        column_weights[bin * width + skipped + i] = weight;
        by_column[i * lanes + bin] = weight;
      }
    }
  }
};

// What a thread needs beside the tensors.
struct Scratch {
  std::vector<float> copied, product, result;

  void fit(const Box &box, int64_t out) {
    const size_t cells = box.rows * box.width, bins = round_up(out, kRowBlock) * box.width;
    if (copied.size() < cells) copied.resize(cells);
    if (product.size() < bins) product.resize(bins);
    result.resize(round_up(out, kRowBlock) * round_up(out, kLanes) + kLanes);
  }
};

// y (out, out) of `cells`, the part of a map that the box touches: (rows, pitch).
static void forward(const Box &box, const float *cells, int64_t pitch, int64_t out, Scratch *scratch, float *y) {
  float *product = scratch->product.data(), *result = scratch->result.data();
  for (int64_t bin = 0; bin < out; ++bin) {
    const float *weights = box.row_weights.data() + bin * box.rows;
    for (int64_t x = 0; x < box.width; x += kLanes) {
      Vec total = {};
      for (int64_t k = box.start[bin]; k < box.end[bin]; ++k) total += load(cells + k * pitch + x) * weights[k];
      store(product + bin * box.width + x, total);
    }
  }
  const int64_t lanes = round_up(out, kLanes);
  for (int64_t first = 0; first < out; first += kRowBlock) {
    const float *from = product + first * box.width + box.skipped;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      Vec sums[kRowBlock] = {};
      for (int64_t x = 0; x < box.columns; ++x) {
        const Vec weights = load(box.by_column.data() + x * lanes + lane);
        for (int i = 0; i < kRowBlock; ++i) sums[i] += weights * from[i * box.width + x];
      }
      for (int i = 0; i < kRowBlock; ++i) {
        // With one vector a row, what is stored beyond its end is overwritten by the next.
        store(result + (lanes == kLanes ? (first + i) * out : (first + i) * lanes + lane), sums[i]);
      }
    }
  }
  if (lanes == kLanes) {
    std::memcpy(y, result, out * out * sizeof(float));
  } else {
    for (int64_t i = 0; i < out; ++i) std::memcpy(y + i * out, result + i * lanes, out * sizeof(float));
  }
}

// Adds rows^T * dy * columns to `cells`.
static void backward(const Box &box, const float *dy, int64_t out, float *cells, int64_t pitch) {
  for (int64_t bin = 0; bin < out; ++bin) {
    const float *weights = box.row_weights.data() + bin * box.rows;
    for (int64_t x = 0; x < box.width; x += kLanes) {
      Vec total = {};
      for (int64_t i = 0; i < out; ++i) {
        total += load(box.column_weights.data() + i * box.width + x) * dy[bin * out + i];
      }
      for (int64_t k = box.start[bin]; k < box.end[bin]; ++k) {
        float *at = cells + k * pitch + x;
        store(at, load(at) + total * weights[k]);
      }
    }
  }
}

// The boxes (B, R, 5) on the levels of a pyramid, whose shapes are (B, C, H, W).
static std::vector<Box> boxes_on(const float *rois, int64_t count, int64_t **maps, const int32_t *options) {
  std::vector<Box> boxes(count);
  parallel(count, kAlwaysParallel, [&](Tasks &tasks) {
    std::vector<float> dense;
    for (const int64_t i : tasks) {
      const float *roi = rois + 5 * i;
      const int level = roi[4] >= 0 && roi[4] < kLevels ? static_cast<int>(roi[4]) : -1;
      if (level < 0) continue;
      const float scale = 1.0f / static_cast<float>(static_cast<int64_t>(options[1]) << level);
      boxes[i] = Box(roi, scale, options[0], maps[level][2], maps[level][3], &dense);
      if (boxes[i].level >= 0) boxes[i].level = level;
    }
  });
  return boxes;
}

}  // namespace mindska

// rois: x1 y1 x2 y2 in pixels, and the number of the level; with another number, or without an area, y is 0. stride: pixels
// of a cell of p0; of each further level it is twice as large.
MINDSKA_OPERATOR(mindska_roi_align,
                 "p0 (B, C, H0, W0), p1 (B, C, H1, W1), p2 (B, C, H2, W2), p3 (B, C, H3, W3), rois (B, R, 5), "
                 "options {out, stride} -> y (B * R, C, out, out) where out >= 1, out <= 64, stride >= 1, stride <= 65536") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], channels = shapes[0][1], count = shapes[4][1];
  const int32_t *options = static_cast<int32_t *>(params[5]);
  const int64_t out = options[0], groups = (channels + kChannelBlock - 1) / kChannelBlock;
  const std::vector<Box> boxes = boxes_on(static_cast<float *>(params[4]), batch * count, shapes, options);
  float *y = static_cast<float *>(params[6]);
  parallel(batch * groups, kAlwaysParallel, [&](Tasks &tasks) {
    Scratch scratch;
    for (const int64_t task : tasks) {
      const int64_t b = task / groups, first = task % groups * kChannelBlock;
      const int64_t end = std::min(channels, first + kChannelBlock);
      for (int64_t i = b * count; i < (b + 1) * count; ++i) {
        const Box &box = boxes[i];
        float *to = y + (i * channels + first) * out * out;
        if (box.level < 0) {
          std::fill(to, to + (end - first) * out * out, 0.0f);
          continue;
        }
        scratch.fit(box, out);
        const int64_t high = shapes[box.level][2], wide = shapes[box.level][3];
        const float *map = static_cast<float *>(params[box.level]);
        for (int64_t c = first; c < end; ++c, to += out * out) {
          const float *cells = map + ((b * channels + c) * high + box.row) * wide + box.column;
          if (!box.is_narrow) {
            forward(box, cells, wide, out, &scratch, to);
            continue;
          }
          float *copied = scratch.copied.data();
          for (int64_t k = 0; k < box.rows; ++k) {
            std::memcpy(copied + k * box.width, cells + k * wide, box.columns * sizeof(float));
            std::fill(copied + k * box.width + box.columns, copied + (k + 1) * box.width, 0.0f);
          }
          forward(box, copied, box.width, out, &scratch, to);
        }
      }
    }
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_roi_align_grad,
                 "p0 (B, C, H0, W0), p1 (B, C, H1, W1), p2 (B, C, H2, W2), p3 (B, C, H3, W3), rois (B, R, 5), "
                 "options {out, stride}, dy (B * R, C, out, out) "
                 "-> d0 (B, C, H0, W0), d1 (B, C, H1, W1), d2 (B, C, H2, W2), d3 (B, C, H3, W3) "
                 "where out >= 1, out <= 64, stride >= 1, stride <= 65536") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], channels = shapes[0][1], count = shapes[4][1];
  const int32_t *options = static_cast<int32_t *>(params[5]);
  const int64_t out = options[0], groups = (channels + kChannelBlock - 1) / kChannelBlock;
  const std::vector<Box> boxes = boxes_on(static_cast<float *>(params[4]), batch * count, shapes, options);
  const float *dy = static_cast<float *>(params[6]);
  float *gradients[kLevels];
  for (int level = 0; level < kLevels; ++level) gradients[level] = static_cast<float *>(params[7 + level]);
  parallel(batch * groups, kAlwaysParallel, [&](Tasks &tasks) {
    Scratch scratch;
    for (const int64_t task : tasks) {
      const int64_t b = task / groups, first = task % groups * kChannelBlock;
      const int64_t end = std::min(channels, first + kChannelBlock);
      for (int level = 0; level < kLevels; ++level) {
        const int64_t pixels = shapes[level][2] * shapes[level][3];
        float *map = gradients[level] + (b * channels + first) * pixels;
        std::fill(map, map + (end - first) * pixels, 0.0f);
      }
      for (int64_t i = b * count; i < (b + 1) * count; ++i) {
        const Box &box = boxes[i];
        if (box.level < 0) continue;
        scratch.fit(box, out);
        const int64_t high = shapes[box.level][2], wide = shapes[box.level][3];
        const float *from = dy + (i * channels + first) * out * out;
        for (int64_t c = first; c < end; ++c, from += out * out) {
          float *cells = gradients[box.level] + ((b * channels + c) * high + box.row) * wide + box.column;
          if (!box.is_narrow) {
            backward(box, from, out, cells, wide);
            continue;
          }
          float *copied = scratch.copied.data();
          std::fill(copied, copied + box.rows * box.width, 0.0f);
          backward(box, from, out, copied, box.width);
          for (int64_t k = 0; k < box.rows; ++k) {
            for (int64_t x = 0; x < box.columns; ++x) cells[k * wide + x] += copied[k * box.width + x];
          }
        }
      }
    }
  });
  return 0;
}

// The masks of objects in boxes, by RoIAlign, from 0.5 on: 0 or 1. masks: eight pixels a byte, the first in the highest bit.
// rois: x1 y1 x2 y2, and the number of the object; with another number 0.
MINDSKA_OPERATOR(mindska_mask_targets,
                 "masks (B, M, H, D) uint8, rois (B, R, 5), options {out} -> targets (B, R, out, out) "
                 "where out >= 1, out <= 64") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], objects = shapes[0][1], high = shapes[0][2], bytes = shapes[0][3];
  const int64_t count = shapes[1][1], out = *static_cast<int32_t *>(params[2]);
  const uint8_t *masks = static_cast<uint8_t *>(params[0]);
  const float *rois = static_cast<float *>(params[1]);
  float *targets = static_cast<float *>(params[3]);
  parallel(batch * count, kAlwaysParallel, [&](Tasks &tasks) {
    std::vector<float> dense;
    Scratch scratch;
    for (const int64_t i : tasks) {
      const float *roi = rois + 5 * i;
      float *to = targets + i * out * out;
      Box box;
      if (roi[4] >= 0 && roi[4] < static_cast<float>(objects)) box = Box(roi, 1, out, high, 8 * bytes, &dense);
      if (box.level < 0) {
        std::fill(to, to + out * out, 0.0f);
        continue;
      }
      scratch.fit(box, out);
      float *copied = scratch.copied.data();
      const uint8_t *mask = masks + (i / count * objects + static_cast<int64_t>(roi[4])) * high * bytes;
      for (int64_t k = 0; k < box.rows; ++k) {
        const uint8_t *row = mask + (box.row + k) * bytes;
        for (int64_t x = 0; x < box.width; ++x) {
          const int64_t column = box.column + x;
          copied[k * box.width + x] = column < 8 * bytes ? row[column / 8] >> (7 - column % 8) & 1 : 0;
        }
      }
      forward(box, copied, box.width, out, &scratch, to);
      for (int64_t k = 0; k < out * out; ++k) to[k] = to[k] >= 0.5f;
    }
  });
  return 0;
}
