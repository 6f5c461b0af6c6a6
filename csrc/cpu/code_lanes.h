// Arrays of state as bytes or bfloat16, to floats and back, a few hundred values at a time: loops that the compiler
// turns into vectors. core/codes.h and core/dtypes.h say what they compute.
//
// `count` may be rounded up to a multiple of kLanes where the arrays have room, so that all of a loop is vectors.
#pragma once

#include "core/codes.h"
#include "core/dtypes.h"
#include "cpu/half_lanes.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kBlockLanes = kCodeBlock + kLanes;  // of a buffer for a block that begins anywhere

CHILDTUNE_INLINE int64_t in_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

CHILDTUNE_OUT_OF_LINE void decode_averages(const uint8_t* __restrict codes, int64_t count, uint8_t scale,
                                           float* __restrict values) {
  const float factor = scale_of(scale);
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) values[j] = decode_average(codes[j], factor);
}

CHILDTUNE_OUT_OF_LINE void decode_squares(const uint8_t* __restrict codes, int64_t count, uint8_t scale,
                                          float* __restrict values) {
  const float factor = scale_of(scale);
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) values[j] = decode_square(codes[j], factor);
}

// Returns the bits of the largest magnitude.
CHILDTUNE_OUT_OF_LINE uint32_t largest_bits(const float* values, int64_t count) {
  int32_t most = 0;  // signed, because SSE2 to AVX2 have no better maximum
  for (int64_t j = 0; j < count; ++j) {
    const int32_t bits = static_cast<int32_t>(bits_of(values[j]) & 0x7FFFFFFFu);
    most = most < bits ? bits : most;
  }
  return static_cast<uint32_t>(most);
}

// `spread[j]` is what element j's random bits are beyond the block's word.
CHILDTUNE_OUT_OF_LINE void encode_averages(const float* __restrict values, int64_t count, uint8_t scale, uint32_t word,
                                           const uint32_t* __restrict spread, uint8_t* __restrict codes) {
  const float inverse = inverse_scale_of(scale);
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) codes[j] = encode_average(values[j], inverse, word + spread[j]);
}

CHILDTUNE_OUT_OF_LINE void encode_squares(const float* __restrict values, int64_t count, uint8_t scale, uint32_t word,
                                          const uint32_t* __restrict spread, uint8_t* __restrict codes) {
  const int32_t least = least_square_of(scale);
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) codes[j] = encode_square(values[j], least, word + spread[j]);
}

// Rounds floats stochastically to numbers that P holds, so that storing them as P changes none.
template <class P>
CHILDTUNE_OUT_OF_LINE void round_randomly(float* values, int64_t count, uint32_t word,
                                          const uint32_t* __restrict spread) {
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    P rounded;
    store_random(rounded, values[j], word + spread[j]);
    values[j] = load(rounded);
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
