// What the 1x1 convolution does with each vector of its result before it is written (oneDNN: post-ops).
#pragma once

#include <cstdint>

#include "activation.h"

namespace mindska {

// With v the result: v, GELU(v), ReLU(v), v + other, ReLU(v + other), SiLU(v) * other, v * other. signatures.py reads this
// list, so that names and numbers are the same in Python.
enum class Epilogue : int32_t { none, gelu, relu, add, add_relu, silu_mul, mul };

constexpr bool uses_other(Epilogue epilogue) { return epilogue >= Epilogue::add; }  // those from `add` on

// other() loads the vector of the second tensor.
template <typename Other>
static inline Vec apply(Epilogue epilogue, Vec v, Other other) {
  if (epilogue == Epilogue::gelu) v = gelu(v);
  if (epilogue == Epilogue::add || epilogue == Epilogue::add_relu) v += other();
  if (epilogue == Epilogue::relu || epilogue == Epilogue::add_relu) v = relu(v);
  if (epilogue == Epilogue::silu_mul) v = silu(v) * other();
  if (epilogue == Epilogue::mul) v *= other();
  return v;
}

}  // namespace mindska
