// GELU, x * Phi(x), and its gradient Phi(x) + x * phi(x); ReLU; SiLU, x * sigmoid(x).
//
// In GELU, with a = |x| / sqrt(2), the tail of the normal distribution is exp(-a^2) * erfcx(a) / 2. The scaled
// complementary error function erfcx is smooth and never cancels: a quotient of polynomials gives it to 5e-9 (relative),
// fitted to SciPy's erfcx on 0 <= a <= 9.4, where the exponential vanishes in float32.
#pragma once

#include "simd.h"

namespace mindska {

// Phi(x), the distribution function of the normal distribution; and exp(-x^2 / 2).
static inline Vec normal_cdf(Vec x, Vec *exponential) {
  Vec a = (x < Vec{} ? -x : x) * 0.707106781f;
  a = a < splat(10.0f) ? a : splat(10.0f);  // infinity over infinity would be NaN
  Vec p = splat(0.03215659409761429f);
  p = p * a + 0.2261614054441452f;
  p = p * a + 0.7251785397529602f;
  p = p * a + 1.2322609424591064f;
  p = p * a + 1.0f;
  Vec q = splat(0.056995272636413574f);
  q = q * a + 0.40089020133018494f;
  q = q * a + 1.3133752346038818f;
  q = q * a + 2.3888678550720215f;
  q = q * a + 2.360640525817871f;
  q = q * a + 1.0f;
  *exponential = exp_negative(x * x * -0.5f);
  const Vec tail = *exponential * 0.5f * (p / q);
  return x < Vec{} ? tail : 1.0f - tail;
}

static inline Vec gelu(Vec x) {
  Vec exponential;
  return x * normal_cdf(x, &exponential);
}

// GELU's gradient, and in `value` GELU(x).
static inline Vec gelu_and_grad(Vec x, Vec dy, Vec *value) {
  Vec exponential;
  const Vec phi = normal_cdf(x, &exponential);
  *value = x * phi;
  return dy * (phi + x * exponential * 0.398942280f);
}

static inline Vec gelu_grad(Vec x, Vec dy) {
  Vec value;
  return gelu_and_grad(x, dy, &value);
}

static inline Vec relu(Vec x) { return x < Vec{} ? Vec{} : x; }  // NaN stays NaN

static inline Vec sigmoid(Vec x) {
  const Vec e = exp_negative(x < Vec{} ? x : -x);
  return (x < Vec{} ? e : splat(1.0f)) / (1.0f + e);
}

static inline Vec silu(Vec x) { return x * sigmoid(x); }

constexpr int64_t kElementwiseGrain = 1 << 14;  // floats of a task

// function(first, count) over the vectors of an array, by all threads.
template <typename Function>
static void parallel_for_each_vector(int64_t size, Function function) {
  parallel_for((size + kElementwiseGrain - 1) / kElementwiseGrain, size, [&](int64_t task) {
    const int64_t start = task * kElementwiseGrain;
    for_each_vector(std::min(kElementwiseGrain, size - start), [&](int64_t i, int count) { function(start + i, count); });
  });
}

}  // namespace mindska
