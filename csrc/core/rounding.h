// The random bits of stochastic rounding: from the mask's generator, in a part of its counters that no mask uses.
//
// A block of 128 elements, the mask's, draws one Philox counter, whose four words are for four arrays of a step.
// Element j of the block takes its word with j's seven bits, in reverse order, added to the word's highest ones without
// carry. So each element's number is uniform and new in each step, which is what makes rounding unbiased; and in a
// block the highest seven bits have each value once, which makes the sum of its errors smaller than that of independent
// ones. It costs one operation an element.
//
//     Philox counter = (low 32 bits of the block's number, its high 31 bits + 2^31, step, param_index), key as in
//     core/mask.h
//
// The counters of masks are below 2^63, so their second words are below 2^31. childtune_fast/ops/rounding.py draws the
// same bits in torch.
#pragma once

#include "core/mask.h"

namespace childtune {

constexpr int kRoundingVersion = 1;                // of what is said above; stands in every state_dict
constexpr uint32_t kRoundingDomain = 0x80000000u;  // in a counter's second word
constexpr uint32_t kNearest = 0x80000000u;         // in place of random bits: rounds to nearest

// The words of a block, for the arrays that are rounded.
struct RoundingWords {
  uint32_t exp_avg, exp_avg_sq, param, max_exp_avg_sq;
};

CHILDTUNE_INLINE RoundingWords rounding_words(const MaskKey& key, uint64_t block) {
  const Philox4 words = mask_words(key, block / kMaskCounters, block % kMaskCounters, kRoundingDomain);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

// Returns what element `j` of a block adds to the word: its seven bits, the lowest of which becomes the highest of all.
CHILDTUNE_INLINE constexpr uint32_t spread_of(uint32_t j) {
  uint32_t reversed = 0;
  for (int bit = 0; bit < 7; ++bit) reversed |= (j >> bit & 1u) << (31 - bit);
  return reversed;
}

// Returns the 32 random bits of element `j` of a block, of which rounding takes as many high ones as it needs.
CHILDTUNE_INLINE uint32_t rounding_bits(uint32_t word, uint32_t j) {
#if defined(__CUDA_ARCH__)
  return word ^ __brev(j);  // the same in one instruction, as j has no other bits
#else
  return word ^ spread_of(j);
#endif
}

}  // namespace childtune
