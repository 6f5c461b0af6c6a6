// The mask of a child network in one parameter, one bit per weight: the layout in memory, as
// childtune_fast/ops/packed_mask.py makes it.
//
// Weight i, by flat index in the parameter's logical order, is in the child network if bit i % 8 of byte i / 8 is set.
// The optimizer's state is compact: it holds the child network's values alone, in the order of their weights. Bits go
// in packed blocks of 1024 weights, the last one filled with zeros. offsets[b] is where the values of packed block b
// begin in the compact state, that is, how many weights of the child network come before it; the last entry of
// `offsets` counts all of them.
#pragma once

#include "core/compiler.h"

namespace childtune {

constexpr int64_t kPackedBlock = 1024;  // weights
constexpr int kMaskAlignment = 16;      // bytes: on a GPU, the bits begin at a multiple of it

struct PackedMask {
  const uint8_t* bits = nullptr;  // nullptr: no child network, every weight is trained
  const int64_t* offsets = nullptr;
  int64_t count = 0;  // weights in the child network
};

CHILDTUNE_INLINE int count_ones(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  int count = 0;
  for (; word != 0; word &= word - 1) ++count;
  return count;
#endif
}

// Returns the number of the highest bit that is set; `word` is not 0.
CHILDTUNE_INLINE int highest_one(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(static_cast<int>(word));
#else
  int bit = 0;
  for (; word > 1; word >>= 1) ++bit;
  return bit;
#endif
}

CHILDTUNE_INLINE int64_t packed_blocks(int64_t numel) { return (numel + kPackedBlock - 1) / kPackedBlock; }

CHILDTUNE_INLINE int64_t mask_bytes(int64_t numel) { return packed_blocks(numel) * (kPackedBlock / 8); }

CHILDTUNE_INLINE bool in_child(const uint8_t* bits, int64_t element) { return bits[element / 8] >> (element % 8) & 1; }

}  // namespace childtune
