// Boxes: which object each prior is matched with, and which of overlapping boxes stay.
//
// All decisions are those of plain float32 operators, one rounded after the other, so that ties are the same: products
// and sums are not contracted.
#pragma GCC optimize("fp-contract=off")
#ifdef __clang__
#pragma clang fp contract(off)
#endif
#include "simd.h"

namespace mindska {

constexpr int64_t kBlock = 1024;  // priors that are compared with an object at once
constexpr int kVectors = kBlock / kLanes;
constexpr int32_t kBackground = -1, kIgnored = -2;
constexpr float kLeastUnion = 1e-6f;

static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Up to kBlock boxes, an array a side.
struct Boxes {
  alignas(sizeof(Vec)) float x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];

  // What is missing in the last vector has no area.
  int read(const float *boxes, int64_t count) {
    const int vectors = static_cast<int>((count + kLanes - 1) / kLanes);
    for (int64_t i = 0; i < vectors * kLanes; ++i) {
      const bool there = i < count;
      x1[i] = there ? boxes[4 * i] : 0;
      y1[i] = there ? boxes[4 * i + 1] : 0;
      x2[i] = there ? boxes[4 * i + 2] : 0;
      y2[i] = there ? boxes[4 * i + 3] : 0;
      area[i] = (x2[i] - x1[i]) * (y2[i] - y1[i]);
    }
    return vectors;
  }

  Vec shared(int vector, const float *box) const {
    const int i = vector * kLanes;
    const Vec wide = smaller(splat(box[2]), load(x2 + i)) - larger(splat(box[0]), load(x1 + i));
    const Vec high = smaller(splat(box[3]), load(y2 + i)) - larger(splat(box[1]), load(y1 + i));
    return larger(wide, Vec{}) * larger(high, Vec{});
  }
};

static inline float area_of(const float *box) { return (box[2] - box[0]) * (box[3] - box[1]); }

static inline Vec iou(const Boxes &boxes, int vector, const float *box, float area) {
  const Vec shared = boxes.shared(vector, box);
  const Vec together = (splat(area) + load(boxes.area + vector * kLanes)) - shared;
  return shared / larger(together, splat(kLeastUnion));
}

static inline float largest_of(Vec v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, v[i]);
  return largest;
}

}  // namespace mindska

// MMDetection's MaxIoUAssigner; thresholds: positive, negative, the least of a low-quality match (above 1: none).
MINDSKA_OPERATOR(mindska_assign_max_iou,
                 "priors (B, A, 4), boxes (B, M, 4), thresholds (3) -> matched (B, A) int32") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], priors = shapes[0][1], objects = shapes[1][1];
  const float *all_priors = static_cast<float *>(params[0]), *all_boxes = static_cast<float *>(params[1]);
  const float *thresholds = static_cast<float *>(params[2]);
  int32_t *matched = static_cast<int32_t *>(params[3]);
  const int64_t blocks = (priors + kBlock - 1) / kBlock;
  std::vector<float> best_of_block(batch * blocks * objects);  // of each object

  parallel(batch * blocks, priors * objects, [&](Tasks &tasks) {
    Boxes some;
    Vec best[kVectors];
    IntVec number[kVectors];
    for (const int64_t task : tasks) {
      const int64_t b = task / blocks, first = task % blocks * kBlock, count = std::min(kBlock, priors - first);
      const int vectors = some.read(all_priors + (b * priors + first) * 4, count);
      std::fill(best, best + vectors, splat(-1));
      std::fill(number, number + vectors, IntVec{});
      for (int64_t m = 0; m < objects; ++m) {
        const float *box = all_boxes + (b * objects + m) * 4;
        const float area = area_of(box);
        Vec most = {};
        if (area > 0 || m == 0) {  // what has no area overlaps nothing
          for (int v = 0; v < vectors; ++v) {
            const Vec overlap = iou(some, v, box, area);
            const IntVec better = overlap > best[v];
            best[v] = better ? overlap : best[v];
            number[v] = better ? IntVec{} + static_cast<int32_t>(m) : number[v];
            most = larger(most, overlap);
          }
        }
        best_of_block[task * objects + m] = largest_of(most);
      }
      int32_t *out = matched + b * priors + first;
      for (int64_t i = 0; i < count; ++i) {
        const float highest = best[i / kLanes][i % kLanes];
        const int32_t other = highest < thresholds[1] ? kBackground : kIgnored;
        out[i] = highest >= thresholds[0] ? number[i / kLanes][i % kLanes] : other;
      }
    }
  });
  if (thresholds[2] > 1) return 0;

  std::vector<float> best(batch * objects, 0.0f);
  for (int64_t task = 0; task < batch * blocks; ++task) {
    float *of_image = best.data() + task / blocks * objects;
    for (int64_t m = 0; m < objects; ++m) of_image[m] = std::max(of_image[m], best_of_block[task * objects + m]);
  }
  parallel(batch * blocks, priors * objects / 8, [&](Tasks &tasks) {
    Boxes some;
    for (const int64_t task : tasks) {
      const int64_t b = task / blocks, first = task % blocks * kBlock, count = std::min(kBlock, priors - first);
      int vectors = 0;
      for (int64_t m = 0; m < objects; ++m) {
        const float highest = best[b * objects + m];
        if (!(highest > 0) || highest < thresholds[2] || best_of_block[task * objects + m] != highest) continue;
        if (!vectors) vectors = some.read(all_priors + (b * priors + first) * 4, count);
        const float *box = all_boxes + (b * objects + m) * 4;
        int32_t *out = matched + b * priors + first;
        for (int v = 0; v < vectors; ++v) {
          const IntVec ties = iou(some, v, box, area_of(box)) == splat(highest);
          for (int lane = 0; lane < kLanes && v * kLanes + lane < count; ++lane) {
            if (ties[lane]) out[v * kLanes + lane] = static_cast<int32_t>(m);
          }
        }
      }
    }
  });
  return 0;
}

// Greedy non-maximum suppression of sorted boxes, the best first: 1 for those that stay.
MINDSKA_OPERATOR(mindska_suppress, "boxes (B, N, 4), threshold (1) -> stays (B, N) int32") {
  using namespace mindska;
  const int64_t batch = shapes[0][0], count = shapes[0][1];
  const float *all = static_cast<float *>(params[0]);
  const float threshold = *static_cast<float *>(params[1]);
  int32_t *stays = static_cast<int32_t *>(params[2]);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  parallel_for(batch, batch * count * 64, [&](int64_t b) {
    std::vector<Boxes> boxes(blocks);
    const float *own = all + b * count * 4;
    int32_t *alive = stays + b * count;
    std::fill(alive, alive + count, 1);
    for (int64_t block = 0; block < blocks; ++block) {
      boxes[block].read(own + block * kBlock * 4, std::min(kBlock, count - block * kBlock));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!alive[i]) continue;
      const float *box = own + 4 * i;
      const float area = area_of(box);
      for (int64_t j = (i + 1) / kLanes * kLanes; j < count; j += kLanes) {
        const Boxes &some = boxes[j / kBlock];
        const int vector = static_cast<int>(j % kBlock / kLanes);
        const Vec shared = some.shared(vector, box);
        const Vec together = (splat(area) + load(some.area + vector * kLanes)) - shared;
        const IntVec goes = shared / together > splat(threshold);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (goes[lane] && j + lane > i && j + lane < count) alive[j + lane] = 0;
        }
      }
    }
  });
  return 0;
}
