// What the operators share: vectors of floats that the compiler maps to the processor's own (AVX2, AVX-512, NEON), and
// the interface of MindSpore's custom operators ("aot"): an operator returns 0, or a number that MindSpore reports.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "signature.h"

namespace mindska {

constexpr int kLanes = 16;
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
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(float));
  return load(buffer);
}

static inline void store_some(float *p, Vec v, int count) {
  if (count == kLanes) return store(p, v);
  float buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(float));
}

static inline Vec splat(float x) { return x - Vec{}; }

// In halves.
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

static inline int64_t size_of(const int64_t *shape, int ndim) {
  int64_t size = 1;
  for (int i = 0; i < ndim; ++i) size *= shape[i];
  return size;
}

// Numbers to compute up to which one thread is done sooner than others have been woken up.
constexpr int64_t kAlone = 1 << 15;

static inline int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// OpenMP reads OMP_NUM_THREADS when it is loaded, with MindSpore (which then sets it itself, for others); a rank may learn
// its share of the cores later.
static inline void take_share_of_threads() {
#ifdef _OPENMP
  static const int share = [] {
    const char *text = std::getenv("MINDSKA_THREADS");
    return text ? std::atoi(text) : 0;
  }();
  if (share > 0) omp_set_num_threads(share);  // of the thread that calls the operator
#endif
}

static inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// At least `size` floats of this thread's own, one array for each purpose: they stay for the next call, because fresh
// memory costs more than most operators do. What they hold is left from before. Aligned: a vector that lies in two lines
// of the cache is read twice.
static inline float *scratch(int purpose, int64_t size) {
  struct Array {
    void *data = nullptr;
    int64_t size = 0;
    ~Array() { std::free(data); }
  };
  static thread_local Array arrays[10];
  Array &array = arrays[purpose];
  if (array.size < size) {
    std::free(array.data);
    array = {};
    const int64_t whole = (size + kLanes - 1) / kLanes * kLanes;
    array.data = std::aligned_alloc(sizeof(Vec), whole * sizeof(float));
    if (!array.data) throw std::bad_alloc();
    array.size = whole;
  }
  return static_cast<float *>(array.data);
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

// An operator, and what it takes and gives: see signature.h.
#define MINDSKA_OPERATOR(name, signature)                                                                               \
  static int name##_checked(int nparam, void **params, int *ndims, int64_t **shapes);                                   \
  extern "C" int name(int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {   \
    mindska::take_share_of_threads();                                                                                   \
    return mindska::run_checked(#name, signature, name##_checked, nparam, params, ndims, shapes, dtypes);               \
  }                                                                                                                     \
  static int name##_checked([[maybe_unused]] int nparam, void **params, [[maybe_unused]] int *ndims, int64_t **shapes)
