// Keys: integers in the order of the scores, by which a child network is selected. -0.0 and 0.0 have one key, and
// infinities have the lowest and the highest. NaN has no place in the order: nan_bit finds it.
#pragma once

#include "core/compiler.h"

namespace childtune {

// A score's magnitude is an integer that grows with it; with the score's sign it gives the order of all scores, and
// with 2^31 added it is unsigned. `flip` is 0, or ~0 to reverse the order.
CHILDTUNE_INLINE uint32_t score_key(float score, uint32_t flip) {
  const uint32_t bits = bit_cast<uint32_t>(score);
  const uint32_t negate = (0u - (bits >> 31)) ^ flip;
  return (((bits & 0x7FFFFFFFu) ^ negate) - negate) + 0x80000000u;
}

// Returns a number whose top bit is set exactly if the score is NaN.
CHILDTUNE_INLINE uint32_t nan_bit(float score) { return 0x7F800000u - (bit_cast<uint32_t>(score) & 0x7FFFFFFFu); }

}  // namespace childtune
