// GELU, x * Phi(x), and its gradient Phi(x) + x * phi(x); ReLU; SiLU, x * sigmoid(x).
//
// In GELU, with a = |x| / sqrt(2), the tail of the normal distribution is exp(-a^2) * erfcx(a) / 2. The scaled
// complementary error function erfcx is smooth and never cancels: a quotient of polynomials gives it to 5e-9 (relative),
// fitted to SciPy's erfcx on 0 <= a <= 9.4, where the exponential vanishes in float32. Here they are polynomials of |x|.
#pragma once

#include "simd.h"

namespace mindska {

// exp(-x^2 / 2), as a power of two; 0 where the exponent is below -115, so that products of it are no denormal numbers.
// NaN stays NaN.
static inline Vec normal_exponential(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
  const Vec exponent = x * x * -0.721347520f, shifted = exponent + magic;
  const Vec f = exponent - (shifted - magic);
  Vec p = splat(0.00015370704932138324f);  // 2^f to 2e-8 (relative) on |f| <= 1 / 2
  p = p * f + 0.0013399848248809576f;
  p = p * f + 0.009618373587727547f;
  p = p * f + 0.05550329014658928f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  typedef uint32_t UintVec __attribute__((vector_size(sizeof(Vec))));  // its sums may overflow, where x is large
  const Vec power = (Vec)((UintVec)p + ((UintVec)shifted << 23));
  return exponent < splat(-115.0f) ? Vec{} : power;
}

// Phi(x), the distribution function of the normal distribution; and exp(-x^2 / 2).
static inline Vec normal_cdf(Vec x, Vec *exponential) {
  Vec a = (Vec)((IntVec)x & 0x7fffffff);
  a = a < splat(14.0f) ? a : splat(14.0f);  // infinity over infinity would be NaN
  Vec p = splat(0.004019574262201786f);
  p = p * a + 0.03998006507754326f;
  p = p * a + 0.18129463493824005f;
  p = p * a + 0.43567004799842834f;
  p = p * a + 0.5f;
  Vec q = splat(0.010075435973703861f);
  q = q * a + 0.10022255033254623f;
  q = q * a + 0.4643482565879822f;
  q = q * a + 1.1944339275360107f;
  q = q * a + 1.6692249774932861f;
  q = q * a + 1.0f;
  *exponential = normal_exponential(x);
  const Vec tail = *exponential * (p / q);
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
