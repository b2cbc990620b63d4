// What the operators share: vectors of floats that the compiler maps to the processor's own (AVX2, AVX-512, NEON), and
// the entry of MindSpore's custom operators ("aot"): it returns 0, or a number that MindSpore reports.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "registry.h"
#include "signature.h"
#include "threads.h"

namespace mindska {

constexpr int kLanes = 16;  // floats in a vector
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

static inline Vec load(const float *p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float *p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The first `count` floats; the others are 0.
static inline Vec load_some(const float *p, int count) {
  if (count == kLanes) return load(p);
#ifdef __AVX512F__
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#endif
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(float));
  return load(buffer);
}

static inline void store_some(float *p, Vec v, int count) {
  if (count == kLanes) return store(p, v);
#ifdef __AVX512F__
  return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#endif
  float buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(float));
}

// Where the low 16 bits of `mask` are 1 the floats at p, which need not be there elsewhere; elsewhere those of `other`.
static inline Vec load_where(Vec other, uint32_t mask, const float *p) {
#ifdef __AVX512F__
  return _mm512_mask_loadu_ps(other, static_cast<__mmask16>(mask), p);
#endif
  if ((mask & 0xffff) == 0xffff) return load(p);
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) other[i] = p[i];
  }
  return other;
}

static inline void store_where(float *p, uint32_t mask, Vec v) {
#ifdef __AVX512F__
  return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
#endif
  if ((mask & 0xffff) == 0xffff) return store(p, v);
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) p[i] = v[i];
  }
}

// Short rows, for which a call of memcpy takes longer than the copy.
static inline void copy_row(const float *from, float *to, int64_t count) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    store_some(to + i, load_some(from + i, n), n);
  }
#else
  std::memcpy(to, from, count * sizeof(float));
#endif
}

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline Vec splat(float x) { return x - Vec{}; }

// The sum of a vector's lanes, in halves.
static inline float sum(Vec v) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  typedef float Quarter __attribute__((vector_size(kLanes / 4 * sizeof(float))));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// The sum of an array.
static inline float sum_of(const float *p, int64_t count) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load(p + i);
  if (i < count) total += load_some(p + i, static_cast<int>(count - i));
  return sum(total);
}

// function(first, count) over the vectors of an array; count is kLanes but at the end.
template <typename Function>
static inline void for_each_vector(int64_t size, Function function) {
  for (int64_t i = 0; i < size; i += kLanes) function(i, static_cast<int>(std::min<int64_t>(kLanes, size - i)));
}

static inline int64_t element_count(const int64_t *shape, int ndim) {
  int64_t size = 1;
  for (int i = 0; i < ndim; ++i) size *= shape[i];
  return size;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -80, so that products of it are no denormal numbers, with
// which processors are a hundred times slower. NaN stays NaN.
static inline Vec exp_negative(Vec x) {
  const Vec clamped = x < splat(-80.0f) ? splat(-80.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec rounded = (clamped * 1.44269504f + magic) - magic;
  const Vec r = (clamped - rounded * 0.693359375f) + rounded * 2.12194440e-4f;  // minus rounded * ln 2, in two parts
  // Taylor's series of exp on |r| <= ln(2) / 2: the first term that is left out is below 1e-8.
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(rounded, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < splat(-80.0f) ? Vec{} : p * power;
}

}  // namespace mindska

// The entry of an operator, and its signature (see signature.h); other libraries find it by its name (registry.h).
#define MINDSKA_OPERATOR(name, signature)                                                                               \
  static int name##_checked(int nparam, void **params, int *ndims, int64_t **shapes);                                   \
  extern "C" int name(int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {   \
    return mindska::run_checked(#name, signature, name##_checked, nparam, params, ndims, shapes, dtypes);               \
  }                                                                                                                     \
  [[maybe_unused]] static const bool name##_added = mindska_add_operator(#name, signature, name##_checked);             \
  static int name##_checked([[maybe_unused]] int nparam, void **params, [[maybe_unused]] int *ndims, int64_t **shapes)
