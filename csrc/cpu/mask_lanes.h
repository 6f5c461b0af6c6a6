// The random bits of mask blocks, drawn by vectors of counters.
//
// The rounds may be taken a few at a time, so that with AVX-512 a block's bits are drawn between the updates of the
// block before it: the update waits for the divider, the generator needs everything but the divider. The other sets
// have too few registers for both at once.
#pragma once

#include "core/mask.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kMaskParts = kMaskBlock / kMaskCounters;  // one for each group of lanes that is updated

struct MaskBits {
  alignas(64) uint32_t word[4][kMaskCounters];
};

#if defined(CHILDTUNE_VECTOR_BYTES)

#if defined(CHILDTUNE_NEON)

// A counter in each 32-bit lane: ARM multiplies four, and sorts the halves of the products, in four instructions.
typedef uint32_t Lanes __attribute__((vector_size(CHILDTUNE_VECTOR_BYTES)));
constexpr int kWide = CHILDTUNE_VECTOR_BYTES / 4;  // counters in a vector

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + static_cast<uint32_t>(x); }

CHILDTUNE_INLINE void multiply(Lanes a, uint32_t multiplier, Lanes* lower, Lanes* upper) {
  const uint32x4_t begin = vreinterpretq_u32_u64(vmull_u32(vget_low_u32((uint32x4_t)a), vdup_n_u32(multiplier)));
  const uint32x4_t end = vreinterpretq_u32_u64(vmull_high_u32((uint32x4_t)a, vdupq_n_u32(multiplier)));
  *lower = (Lanes)vuzp1q_u32(begin, end);
  *upper = (Lanes)vuzp2q_u32(begin, end);
}

// Returns which counter is in a lane of the first of two vectors, and of the second.
CHILDTUNE_INLINE int counter_in(bool second, int lane) { return lane + second * kWide; }

// Stores a word of the counters in two vectors, in order.
CHILDTUNE_INLINE void store_word(Lanes first, Lanes second, uint32_t* to) {
  memcpy(to, &first, sizeof first);
  memcpy(to + kWide, &second, sizeof second);
}

#else

// A counter in each 64-bit lane, in the low half: the product of the low halves of 64-bit lanes is the one widening
// product that every x86 set has, and the high halves may hold anything, because only low halves are multiplied and
// stored.
typedef uint64_t Lanes __attribute__((vector_size(CHILDTUNE_VECTOR_BYTES)));
constexpr int kWide = CHILDTUNE_VECTOR_BYTES / 8;  // counters in a vector

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + x; }

CHILDTUNE_INLINE void multiply(Lanes a, uint32_t multiplier, Lanes* lower, Lanes* upper) {
  *lower = (Lanes)CHILDTUNE_MULTIPLY_LOW((CHILDTUNE_VECTOR)a, (CHILDTUNE_VECTOR)broadcast(multiplier));
#if defined(CHILDTUNE_HIGH_TO_LOW)
  *upper = (Lanes)CHILDTUNE_HIGH_TO_LOW((CHILDTUNE_VECTOR)*lower);
#else
  *upper = *lower >> 32;
#endif
}

// Pairs of counters alternate between two vectors: so does the shuffle that puts their low halves in order.
CHILDTUNE_INLINE int counter_in(bool second, int lane) { return lane / 2 * 4 + second * 2 + lane % 2; }

CHILDTUNE_INLINE void store_word(Lanes first, Lanes second, uint32_t* to) {
  const CHILDTUNE_VECTOR merged = CHILDTUNE_LOW_HALVES((CHILDTUNE_VECTOR)first, (CHILDTUNE_VECTOR)second);
  memcpy(to, &merged, sizeof merged);
}

#endif

constexpr int kRounds = 10;

// A parameter's key, and its ten round keys. `domain` is 0, or kRoundingDomain for the counters of core/rounding.h: as
// mask bits they are those of block / 16.
struct MaskKeys {
  MaskKey key;
  uint32_t domain;
  Lanes round[kRounds][2];

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k, uint32_t d = 0) : key(k), domain(d) {
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int r = 0; r < kRounds; ++r, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      round[r][0] = broadcast(key0);
      round[r][1] = broadcast(key1);
    }
  }
};

struct Counters {
  Lanes c0, c1, c2, c3;

  // Begins those counters of `block`, `first` and after, that are in the first or the second of two vectors.
  CHILDTUNE_MEMBER void begin(const MaskKeys& keys, uint64_t block, int first, bool second) {
    Lanes number;
    for (int lane = 0; lane < kWide; ++lane) number[lane] = first + counter_in(second, lane);
    c0 = broadcast(block * kMaskCounters) + number;
    c1 = broadcast(block * kMaskCounters >> 32 | keys.domain);  // the same for all counters of a block
    c2 = broadcast(keys.key.step);
    c3 = broadcast(keys.key.param_index);
  }

  CHILDTUNE_MEMBER void round(const Lanes* round_key) {
    Lanes lower0, upper0, lower1, upper1;
    multiply(c0, kPhiloxMultiplier0, &lower0, &upper0);
    multiply(c2, kPhiloxMultiplier1, &lower1, &upper1);
    c0 = upper1 ^ (c1 ^ round_key[0]);
    c2 = upper0 ^ (c3 ^ round_key[1]);
    c1 = lower1;
    c3 = lower0;
  }
};

// As many vectors at once as hide each other's latency and have registers.
constexpr int kVectors = kWide == 8 ? 2 : 4;
constexpr int kAtOnce = kVectors * kWide;  // counters

struct MaskDraw {
  Counters vector[kVectors];
};

// Takes the rounds kBegin .. kEnd of the counters of `block` from number `j` on: the first round begins them, the last
// one stores their bits. Template arguments, so that the code has no branches and keeps `d` in registers.
template <int kBegin, int kEnd>
CHILDTUNE_INLINE void draw_rounds(const MaskKeys& keys, uint64_t block, int j, MaskDraw& d, MaskBits* bits) {
  if (kBegin == 0) {
    CHILDTUNE_UNROLL
    for (int i = 0; i < kVectors; ++i) d.vector[i].begin(keys, block, j + i / 2 * 2 * kWide, i % 2 == 1);
  }
  CHILDTUNE_UNROLL
  for (int round = kBegin; round < kEnd; ++round) {
    CHILDTUNE_UNROLL
    for (int i = 0; i < kVectors; ++i) d.vector[i].round(keys.round[round]);
  }
  if (kEnd < kRounds) return;
  CHILDTUNE_UNROLL
  for (int i = 0; i < kVectors; i += 2) {
    const Counters &first = d.vector[i], &second = d.vector[i + 1];
    store_word(first.c0, second.c0, bits->word[0] + j + i * kWide);
    store_word(first.c1, second.c1, bits->word[1] + j + i * kWide);
    store_word(first.c2, second.c2, bits->word[2] + j + i * kWide);
    store_word(first.c3, second.c3, bits->word[3] + j + i * kWide);
  }
}

CHILDTUNE_OUT_OF_LINE void draw_block(const MaskKeys& keys, uint64_t block, MaskBits* bits) {
  for (int j = 0; j < kMaskCounters; j += kAtOnce) {
    MaskDraw draw;
    draw_rounds<0, kRounds>(keys, block, j, draw, bits);
  }
}

#else

struct MaskKeys {
  MaskKey key;
  uint32_t domain;

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k, uint32_t d = 0) : key(k), domain(d) {}
};

CHILDTUNE_OUT_OF_LINE void draw_block(const MaskKeys& keys, uint64_t block, MaskBits* bits) {
  for (int j = 0; j < kMaskCounters; ++j) {
    const Philox4 words = mask_words(keys.key, block, j, keys.domain);
    for (int word = 0; word < 4; ++word) bits->word[word][j] = words.word[word];
  }
}

#endif

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
