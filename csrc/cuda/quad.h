// Four neighbouring elements of an array, which a lane of a GPU reads and writes together.
#pragma once

#include "core/compiler.h"

namespace childtune {

// Aligned, so that one or two instructions move all four.
template <class V>
struct alignas(4 * sizeof(V) < 16 ? 4 * sizeof(V) : 16) Four {
  V of[4];
};

// Where a quad, four neighbouring elements, lies in an array, and which of them, [low, high), exist. A caller may raise
// `low` to leave out the first ones.
struct QuadSpan {
  int64_t at;
  int low, high;
  bool vector;  // all four exist, and their address is a multiple of Four's alignment
};

// The quad at `at` of arrays of `numel` elements, which may end within it or before.
CHILDTUNE_INLINE QuadSpan quad_at(int64_t at, int64_t numel, bool aligned) {
  const int64_t there = numel - at;
  const int high = there < 4 ? (there > 0 ? static_cast<int>(there) : 0) : 4;
  return {at, 0, high, aligned && high == 4};
}

// Hides from the compiler what four elements of 1 or 2 bytes are made of: else it takes a vector apart in the branch
// that loads it, so that each load is waited for before the next.
template <class V>
CHILDTUNE_INLINE void keep_packed(Four<V>& four) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 2) {
    uint32_t words[2];
    memcpy(words, &four, sizeof(words));
    asm("" : "+r"(words[0]), "+r"(words[1]));
    memcpy(&four, words, sizeof(words));
  } else if constexpr (sizeof(V) == 1) {
    uint32_t word;
    memcpy(&word, &four, sizeof(word));
    asm("" : "+r"(word));
    memcpy(&four, &word, sizeof(word));
  }
#else
  static_cast<void>(four);
#endif
}

// load_four and store_four move the elements that exist and leave the others as they are. They take a reference to the
// pointer where it stands in the kernel's argument, so that it is read where it is used and takes no register before.
template <class V, class Stored>
CHILDTUNE_INLINE void load_four(Stored* const& from, const QuadSpan& span, Four<V>& to) {
  if (span.vector) {
    to = *reinterpret_cast<const Four<V>*>(static_cast<const V*>(from) + span.at);
  } else {
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      if (i >= span.low && i < span.high) to.of[i] = static_cast<const V*>(from)[span.at + i];
    }
  }
  keep_packed(to);
}

template <class V, class Stored>
CHILDTUNE_INLINE void store_four(Stored* const& to, const QuadSpan& span, const Four<V>& from) {
  if (span.vector) {
    *reinterpret_cast<Four<V>*>(static_cast<V*>(to) + span.at) = from;
    return;
  }
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    if (i >= span.low && i < span.high) static_cast<V*>(to)[span.at + i] = from.of[i];
  }
}

}  // namespace childtune
