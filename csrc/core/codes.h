// The codes of 8-bit state: a byte for each value, and for each block of 128 values, the mask's, a byte that says how
// large they are. Both arrays of a step, the average and the average of squares, are decoded, updated as floats by
// core/adamw.h, and encoded again by stochastic rounding (core/rounding.h).
//
// Block b of a parameter has the values of its elements 128 * b .. 128 * b + 127; with a child network, of those among
// them that are in it. Its scale is a power of two, 2^(s - 127), and is stored as s. s is 0 where all values are 0,
// else the smallest number of at least 32 with which the largest of them can be encoded.
//
//     average              sign, 7-bit number k     +-(float(k / 8) - 2^-15) * scale, never -0
//     average of squares   8-bit number k           float(k / 8) * 2^-16 * scale, at least 2^-31 of the scale
//
// where float(e + f / 8) = 2^(e - 15) * (1 + f / 8): a small float of 3 bits of mantissa. So an average is accurate to
// 6 to 12 % and, near 0, to 2^-18 of the scale; 0 is a number of it. An average of squares is accurate to 6 to 12 %
// down to 2^-31 of the scale, and is never rounded to 0 in a block that has others: the update divides by its root.
//
// As a scale is a power of two, decoding is exact. A value that does not change keeps its code while its block's scale
// stays; under another scale, an average of squares keeps its value, and an average is rounded again. Values that no
// code can hold: sanitize, below. childtune_fast/ops/codes.py has the same in torch.
#pragma once

#include "core/compiler.h"
#include "core/rounding.h"

namespace childtune {

constexpr int kCodeBlock = kMaskBlock;   // values that share a scale
constexpr uint32_t kLeastScale = 32;     // so that every decoded number is a normal float
constexpr uint32_t kMostScale = 253;     // so that the inverse of every scale is a normal float
constexpr uint32_t kRoom = 0x001000FFu;  // added to a float's bits, carries into the exponent if 1.875 - 2^-15 scales
                                         // are not enough for it
constexpr uint32_t kMostBits = ((kMostScale + 1) << 23) - kRoom - 1;  // of the largest float that can be encoded
constexpr float kShift = 0x1p-15f;  // added to a scaled average, so that there is a code of 0
constexpr uint32_t kShiftCode = 112 << 3;

// Returns the byte of a block's scale; `most` has the bits of the largest magnitude in the block.
CHILDTUNE_INLINE uint32_t scale_byte(uint32_t most) {
  const uint32_t exponent = (most + kRoom) >> 23;
  return most == 0 ? 0 : exponent < kLeastScale ? kLeastScale : exponent;
}

// Returns a block's scale, by which decode multiplies.
CHILDTUNE_INLINE float scale_of(uint32_t byte) { return bit_cast<float>(byte << 23); }

// Returns the inverse of a block's scale, by which encode_average multiplies; that of any scale where all values are 0.
CHILDTUNE_INLINE float inverse_scale_of(uint32_t byte) {
  return bit_cast<float>((254 - (byte == 0 ? kLeastScale : byte)) << 23);
}

// Returns the bits of the smallest average of squares that a block encodes.
CHILDTUNE_INLINE int32_t least_square_of(uint32_t byte) {
  return static_cast<int32_t>(((byte == 0 ? kLeastScale : byte) - 31) << 23);
}

CHILDTUNE_INLINE float decode_average(uint8_t code, float scale) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t shifted = (static_cast<uint32_t>(code & 0x7Fu) << 20) + (kShiftCode << 20);
  return (bit_cast<float>(shifted | sign) - bit_cast<float>(bits_of(kShift) | sign)) * scale;
}

// `random` are the element's bits of core/rounding.h, or kNearest.
CHILDTUNE_INLINE uint8_t encode_average(float value, float inverse_scale, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const float shifted = bit_cast<float>(bits & 0x7FFFFFFFu) * inverse_scale + kShift;
  const uint32_t number = ((bit_cast<uint32_t>(shifted) + (random >> 12)) >> 20) - kShiftCode;
  return static_cast<uint8_t>(number | (bits >> 31 << 7));
}

CHILDTUNE_INLINE float decode_square(uint8_t code, float scale) {
  return bit_cast<float>((static_cast<uint32_t>(code) << 20) + (96u << 23)) * scale;
}

CHILDTUNE_INLINE uint8_t encode_square(float value, int32_t least, uint32_t random) {
  const int32_t above = bit_cast<int32_t>(value) - least;
  return static_cast<uint8_t>((static_cast<uint32_t>(above > 0 ? above : 0) + (random >> 12)) >> 20);
}

CHILDTUNE_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7FFFFFFFu) < 0x7F800000u; }

// Makes an element's values such as codes can hold. The weight of an average that is infinite or NaN is so too, and
// nothing will change that: its state becomes 0, so that its block keeps its scale. Other values are limited to the
// largest that a code can hold, 1.59e38.
CHILDTUNE_INLINE void sanitize(float& exp_avg, float& exp_avg_sq, float& max_exp_avg_sq) {
  const float most = bit_cast<float>(kMostBits);
  const bool lost = !is_finite(exp_avg) || exp_avg_sq != exp_avg_sq;
  const bool maximum_lost = lost || max_exp_avg_sq != max_exp_avg_sq;
  exp_avg = lost ? 0.0f : exp_avg > most ? most : exp_avg < -most ? -most : exp_avg;
  exp_avg_sq = lost ? 0.0f : exp_avg_sq > most ? most : exp_avg_sq;
  max_exp_avg_sq = maximum_lost ? 0.0f : max_exp_avg_sq > most ? most : max_exp_avg_sq;
}

}  // namespace childtune
