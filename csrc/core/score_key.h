// Scores as integers of the same order, by which a child network is selected: -0.0 equals 0.0, infinities are in their
// places. NaN has no place.
#pragma once

#include "core/compiler.h"

namespace childtune {

// Magnitudes, signed, are in order; the key is that as an unsigned number. `flip` is 0, or -1 to turn the order around.
CHILDTUNE_INLINE uint32_t score_key(float score, uint32_t flip) {
  const uint32_t bits = bit_cast<uint32_t>(score);
  const uint32_t negate = (0u - (bits >> 31)) ^ flip;
  return (((bits & 0x7FFFFFFFu) ^ negate) - negate) + 0x80000000u;
}

// The top bit is set exactly if the score is NaN.
CHILDTUNE_INLINE uint32_t nan_bit(float score) { return 0x7F800000u - (bit_cast<uint32_t>(score) & 0x7FFFFFFFu); }

}  // namespace childtune
