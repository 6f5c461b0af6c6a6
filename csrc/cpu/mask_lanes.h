// The random bits of mask blocks, drawn by vectors of counters.
//
// Drawing is cut into kMaskParts parts, so that a block's bits can be drawn between the updates of the block before it:
// the update waits for the divider, the generator needs everything but the divider.
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
constexpr int kLaneStep = 1, kSecond = kWide;      // two vectors hold neighbouring counters, one after the other

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + static_cast<uint32_t>(x); }

CHILDTUNE_INLINE void multiply(Lanes a, uint32_t multiplier, Lanes* lower, Lanes* upper) {
  const uint32x4_t begin = vreinterpretq_u32_u64(vmull_u32(vget_low_u32((uint32x4_t)a), vdup_n_u32(multiplier)));
  const uint32x4_t end = vreinterpretq_u32_u64(vmull_high_u32((uint32x4_t)a, vdupq_n_u32(multiplier)));
  *lower = (Lanes)vuzp1q_u32(begin, end);
  *upper = (Lanes)vuzp2q_u32(begin, end);
}

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
constexpr int kLaneStep = 2, kSecond = 1;          // even counters in one vector, odd ones in the other

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + x; }

CHILDTUNE_INLINE void multiply(Lanes a, uint32_t multiplier, Lanes* lower, Lanes* upper) {
  *lower = (Lanes)CHILDTUNE_MULTIPLY_LOW((CHILDTUNE_VECTOR)a, (CHILDTUNE_VECTOR)broadcast(multiplier));
#if defined(CHILDTUNE_HIGH_TO_LOW)
  *upper = (Lanes)CHILDTUNE_HIGH_TO_LOW((CHILDTUNE_VECTOR)*lower);
#else
  *upper = *lower >> 32;
#endif
}

// Stores a word of the counters in two vectors, in order.
CHILDTUNE_INLINE void store_word(Lanes first, Lanes second, uint32_t* to) {
  const Lanes merged = (first & 0xFFFFFFFFu) | (second << 32);
  memcpy(to, &merged, sizeof merged);
}

#endif

constexpr int kRounds = 10;

// A parameter's key, and its ten round keys.
struct MaskKeys {
  MaskKey key;
  Lanes round[kRounds][2];

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k) : key(k) {
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int r = 0; r < kRounds; ++r, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      round[r][0] = broadcast(key0);
      round[r][1] = broadcast(key1);
    }
  }
};

struct Counters {
  Lanes c0, c1, c2, c3;

  // Begins the counters of `block` from number `first` on that are in one vector.
  CHILDTUNE_MEMBER void begin(const MaskKey& key, uint64_t block, int first) {
    Lanes number;
    for (int lane = 0; lane < kWide; ++lane) number[lane] = first + kLaneStep * lane;
    c0 = broadcast(block * kMaskCounters) + number;
    c1 = broadcast(block * kMaskCounters >> 32);  // the same for all counters of a block
    c2 = broadcast(key.step);
    c3 = broadcast(key.param_index);
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

struct MaskDraw {
  Counters first, second;
};

// Does part kPart of drawing the bits of `block`. The part is a template argument, so that its code has no branches and
// keeps `d` in registers.
template <int kPart>
CHILDTUNE_INLINE void draw_part(const MaskKeys& keys, uint64_t block, MaskDraw& d, MaskBits* bits) {
  constexpr int kAtOnce = 2 * kWide, kSteps = kMaskCounters / kAtOnce * kRounds;
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
  for (int step = kSteps * kPart / kMaskParts; step < kSteps * (kPart + 1) / kMaskParts; ++step) {
    const int j = step / kRounds * kAtOnce, round = step % kRounds;
    if (round == 0) {
      d.first.begin(keys.key, block, j);
      d.second.begin(keys.key, block, j + kSecond);
    }
    d.first.round(keys.round[round]);
    d.second.round(keys.round[round]);
    if (round == kRounds - 1) {
      store_word(d.first.c0, d.second.c0, bits->word[0] + j);
      store_word(d.first.c1, d.second.c1, bits->word[1] + j);
      store_word(d.first.c2, d.second.c2, bits->word[2] + j);
      store_word(d.first.c3, d.second.c3, bits->word[3] + j);
    }
  }
}

#else

struct MaskKeys {
  MaskKey key;

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k) : key(k) {}
};

struct MaskDraw {};

CHILDTUNE_OUT_OF_LINE void draw_counters(const MaskKey& key, uint64_t block, int begin, int end, MaskBits* bits) {
  for (int j = begin; j < end; ++j) {
    const Philox4 words = mask_words(key, block, j);
    for (int word = 0; word < 4; ++word) bits->word[word][j] = words.word[word];
  }
}

template <int kPart>
CHILDTUNE_INLINE void draw_part(const MaskKeys& keys, uint64_t block, MaskDraw&, MaskBits* bits) {
  constexpr int kCounters = kMaskCounters / kMaskParts;
  draw_counters(keys.key, block, kCounters * kPart, kCounters * (kPart + 1), bits);
}

#endif

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
