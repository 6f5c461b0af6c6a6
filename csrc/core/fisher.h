// One gradient's share in a weight's Fisher score: the only place in C++ where this arithmetic is written, for CPU and
// GPU.
//
// Each operation is rounded as IEEE 754 says, in this order. childtune_fast/ops/reference.py has the same arithmetic in
// torch.
#pragma once

#include "core/compiler.h"

namespace childtune {

// Scores are float. T is float, or double for double gradients, whose sum is rounded once when it is stored.
template <class T>
CHILDTUNE_INLINE void add_square(T weight, T grad_factor, T grad, float& score) {
  const T scaled = grad * grad_factor;
  score = static_cast<float>(static_cast<T>(score) + weight * scaled * scaled);
}

// Returns a number whose top bit is set exactly if x is infinite or NaN. Such numbers combine by |, which vectorises
// everywhere.
CHILDTUNE_INLINE uint32_t non_finite_bit(float x) { return (bit_cast<uint32_t>(x) & 0x7FFFFFFFu) + 0x00800000u; }
CHILDTUNE_INLINE uint64_t non_finite_bit(double x) {
  return (bit_cast<uint64_t>(x) & 0x7FFFFFFFFFFFFFFFull) + 0x0010000000000000ull;
}

}  // namespace childtune
