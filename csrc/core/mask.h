// Where each weight's random bits come from: the placement of mask bits in Philox words, version 1. cpu/mask_lanes.h
// draws the same bits by vectors, childtune_fast/ops/random_mask.py in torch.
//
// keep(element) is a pure function of (seed, step, param_index, element), where `element` is the flat index in the
// whole parameter. Elements go in blocks of 128; block b draws from the 16 counters 16b .. 16b+15, eight 16-bit numbers
// each:
//
//     element 128*b + 32*word + 16*half + j   takes   half-word `half` of word `word` of counter 16*b + j
//
//     Philox counter = (low 32 bits of the counter's number, high 32 bits, step, param_index), key = (seed low, seed
//     high)
//
// So sixteen neighbouring elements use the same word and half of sixteen neighbouring counters: a vector of counters
// yields a vector of masks in order, without shuffles, at every vector width that divides 16.
#pragma once

#include "core/philox.h"

namespace childtune {

constexpr int kMaskVersion = 1;         // of the placement; stands in every state_dict
constexpr int kMaskBlock = 128;         // elements that share a set of counters
constexpr int kMaskCounters = 16;       // counters of a block
constexpr uint32_t kKeepAll = 1 << 16;  // keep_threshold of reserve_p = 1: no mask at all

struct MaskKey {
  uint64_t seed;
  uint32_t step;         // the parameter's own step count, 1 at its first step
  uint32_t param_index;  // its index in the optimizer, counted through all groups
};

// Returns the 128 random bits of counter `j` of block `block`. `domain` is 0, or core/rounding.h's.
CHILDTUNE_INLINE Philox4 mask_words(const MaskKey& key, uint64_t block, uint32_t j, uint32_t domain = 0) {
  const uint64_t number = block * kMaskCounters + j;
  return philox4x32_10(static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32) | domain, key.step,
                       key.param_index, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

// Returns whether the 16-bit number in half-word `half` of `word` keeps its element.
CHILDTUNE_INLINE bool keeps(uint32_t word, int half, uint32_t keep_threshold) {
  // Both sides are below 2^17, so a signed comparison, the only one AVX2 has, is exact.
  return static_cast<int32_t>((word >> (16 * half)) & 0xFFFFu) < static_cast<int32_t>(keep_threshold);
}

// Returns whether the mask keeps one element. Every vectorised form must agree with it.
CHILDTUNE_INLINE bool keep_element(const MaskKey& key, uint64_t element, uint32_t keep_threshold) {
  const uint32_t in_block = static_cast<uint32_t>(element % kMaskBlock);
  const Philox4 words = mask_words(key, element / kMaskBlock, in_block % 16);
  return keeps(words.word[in_block / 32], in_block / 16 % 2, keep_threshold);
}

}  // namespace childtune
