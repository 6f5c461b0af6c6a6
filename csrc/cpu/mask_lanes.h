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

// A counter in each 64-bit lane, in the low half: the product of the low halves of 64-bit lanes is the one widening
// product that every x86 set has, and the high halves may hold anything, because only low halves are multiplied and
// stored.
typedef uint64_t Lanes __attribute__((vector_size(CHILDTUNE_VECTOR_BYTES)));
constexpr int kWide = CHILDTUNE_VECTOR_BYTES / 8;  // counters in a vector
constexpr int kRounds = 10;

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + x; }

CHILDTUNE_INLINE Lanes multiply_low(Lanes a, Lanes b) {
  return (Lanes)CHILDTUNE_MULTIPLY_LOW((CHILDTUNE_VECTOR)a, (CHILDTUNE_VECTOR)b);
}

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

  // Begins every second counter from `first` on.
  CHILDTUNE_MEMBER void begin(const MaskKey& key, uint64_t first) {
    Lanes iota;
    for (int lane = 0; lane < kWide; ++lane) iota[lane] = 2 * lane;
    c0 = iota + first;
    c1 = broadcast(first >> 32);
    c2 = broadcast(key.step);
    c3 = broadcast(key.param_index);
  }

  CHILDTUNE_MEMBER void round(const Lanes* round_key) {
    const Lanes product0 = multiply_low(c0, broadcast(kPhiloxMultiplier0));
    const Lanes product1 = multiply_low(c2, broadcast(kPhiloxMultiplier1));
    c0 = (product1 >> 32) ^ (c1 ^ round_key[0]);
    c2 = (product0 >> 32) ^ (c3 ^ round_key[1]);
    c1 = product1;
    c3 = product0;
  }
};

// Even counters in one vector, odd ones in the other: interleaved, they are in order.
struct MaskDraw {
  Counters even, odd;
};

CHILDTUNE_INLINE void interleave(Lanes even, Lanes odd, uint32_t* to) {
  const Lanes merged = (even & 0xFFFFFFFFu) | (odd << 32);
  memcpy(to, &merged, sizeof merged);
}

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
      d.even.begin(keys.key, block * kMaskCounters + j);
      d.odd.begin(keys.key, block * kMaskCounters + j + 1);
    }
    d.even.round(keys.round[round]);
    d.odd.round(keys.round[round]);
    if (round == kRounds - 1) {
      interleave(d.even.c0, d.odd.c0, bits->word[0] + j);
      interleave(d.even.c1, d.odd.c1, bits->word[1] + j);
      interleave(d.even.c2, d.odd.c2, bits->word[2] + j);
      interleave(d.even.c3, d.odd.c3, bits->word[3] + j);
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
