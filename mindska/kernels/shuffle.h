// Vectors whose elements change places.
#pragma once

#include "simd.h"

namespace mindska {

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define MINDSKA_SHUFFLE
#endif
#endif

// The elements at even places of both vectors (at odd ones, where `odd` is 1).
template <int odd>
static inline Vec every_second(Vec a, Vec b) {
#ifdef MINDSKA_SHUFFLE
  if (odd) return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
  Vec v = {};
  for (int i = 0; i < kLanes / 2; ++i) v[i] = a[2 * i + odd], v[i + kLanes / 2] = b[2 * i + odd];
  return v;
#endif
}

// The elements of both vectors in turn, in two.
static inline void in_turn(Vec a, Vec b, Vec (&to)[2]) {
#ifdef MINDSKA_SHUFFLE
  to[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  to[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  for (int i = 0; i < kLanes; ++i) {
    Vec &half = to[2 * i / kLanes];
    half[2 * i % kLanes] = a[i], half[2 * i % kLanes + 1] = b[i];
  }
#endif
}

// Rows of 16 x 16 floats become columns.
static inline void transpose(Vec (&rows)[kLanes]) {
#ifdef MINDSKA_SHUFFLE
  // Row i and row i + 8 in turn, four times.
  for (int round = 0; round < 4; ++round) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const Vec a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
  }
#endif
}

}  // namespace mindska
