// GELU, x * Phi(x), and its gradient Phi(x) + x * phi(x).
//
// With a = |x| / sqrt(2), the tail of the normal distribution is exp(-a^2) * erfcx(a) / 2. The scaled complementary error
// function erfcx is smooth and never cancels: a quotient of polynomials gives it to 5e-9 (relative), fitted to SciPy's
// erfcx on 0 <= a <= 9.4, where the exponential vanishes in float32.
#include "simd.h"

namespace mindska {

// Phi(x) and exp(-x^2 / 2).
static inline Vec distribution(Vec x, Vec *density) {
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
  *density = exp_negative(x * x * -0.5f);
  const Vec tail = *density * 0.5f * (p / q);
  return x < Vec{} ? tail : 1.0f - tail;
}

static inline Vec gelu(Vec x) {
  Vec density;
  return x * distribution(x, &density);
}

static inline Vec gelu_gradient(Vec x, Vec dout) {
  Vec density;
  const Vec phi = distribution(x, &density);
  return dout * (phi + x * density * 0.398942280f);
}

constexpr int64_t kChunk = 1 << 14;  // floats a thread takes at once

// function(first, count), over chunks of an array; count is kLanes but at the end.
template <typename Function>
static void for_each_vector(int64_t size, Function function) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < size; start += kChunk) {
    const int64_t end = std::min(start + kChunk, size);
    for (int64_t i = start; i < end; i += kLanes) function(i, static_cast<int>(std::min<int64_t>(kLanes, end - i)));
  }
}

}  // namespace mindska

// Inputs x; outputs y.
MINDSKA_OPERATOR(mindska_gelu) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]);
  float *y = static_cast<float *>(params[1]);
  for_each_vector(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    if (count == kLanes) {
      store(y + i, gelu(load(x + i)));
    } else {
      store_some(y + i, gelu(load_some(x + i, count)), count);
    }
  });
  return 0;
}

// Inputs x, dy; outputs dx.
MINDSKA_OPERATOR(mindska_gelu_grad) {
  using namespace mindska;
  const float *x = static_cast<float *>(params[0]), *dout = static_cast<float *>(params[1]);
  float *dx = static_cast<float *>(params[2]);
  for_each_vector(size_of(shapes[0], ndims[0]), [=](int64_t i, int count) {
    if (count == kLanes) {
      store(dx + i, gelu_gradient(load(x + i), load(dout + i)));
    } else {
      store_some(dx + i, gelu_gradient(load_some(x + i, count), load_some(dout + i, count)), count);
    }
  });
  return 0;
}
