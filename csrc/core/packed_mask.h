// The mask of a child network in one parameter, one bit per weight: the layout in memory, as
// childtune_fast/packed_mask.py makes it.
//
// Weight i, by flat index in the parameter's logical order, is in the child network if bit i % 8 of byte i / 8 is set.
// Bits go in blocks of 1024, the last one filled with zeros; ranks[b] counts the child network's weights before block
// b, and the last entry of `ranks` all of them. The optimizer state holds the child network's values alone, in this
// order.
#pragma once

#include "core/compiler.h"

namespace childtune {

constexpr int64_t kRankBlock = 1024;
constexpr int kMaskAlignment = 16;  // bytes, of the bits

struct PackedMask {
  const uint8_t* bits = nullptr;  // nullptr: no child network, every weight is trained
  const int64_t* ranks = nullptr;
  int64_t count = 0;  // of weights in the child network
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

CHILDTUNE_INLINE int64_t mask_blocks(int64_t numel) { return (numel + kRankBlock - 1) / kRankBlock; }

CHILDTUNE_INLINE int64_t mask_bytes(int64_t numel) { return mask_blocks(numel) * (kRankBlock / 8); }

CHILDTUNE_INLINE bool in_child(const uint8_t* bits, int64_t element) { return bits[element / 8] >> (element % 8) & 1; }

}  // namespace childtune
