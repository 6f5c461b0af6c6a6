// How the weights of a child network are moved out from among their neighbours, and back, in plain C++.
//
// Where the set bits of a mask are is written into a list first, without a branch that depends on a bit: a processor
// cannot guess the bits of a mask, and each wrong guess costs it more than a weight's whole update. After that, a move
// is a loop over the list.
#pragma once

#include <type_traits>

#include "core/packed_mask.h"
#include "cpu/isa.h"
#include "cpu/loops.h"
#include "cpu/spread.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// The places of each byte's set bits, in order, and how many they are.
struct PlaceTable {
  alignas(16) uint16_t place[256][8];  // as wide as what is computed with them
  uint8_t count[256];

  constexpr PlaceTable() : place(), count() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) place[byte][count[byte]++] = static_cast<uint16_t>(bit);
      }
    }
  }
};
constexpr PlaceTable kPlaceTable;

CHILDTUNE_INLINE int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t n = 0;
  for (int64_t i = 0; i < bytes; ++i) n += kPlaceTable.count[bits[i]];
  return n;
}

// Writes the places of all set bits, in order, and up to eight numbers beyond them. Returns how many they are. Also
// fetches the next packed block's weights and gradients: the step works in the cache, so memory is idle.
template <class P>
CHILDTUNE_OUT_OF_LINE int64_t find_places(const uint8_t* bits, int64_t bytes, const P* param, const P* grad,
                                          uint16_t* __restrict place) {
  constexpr int64_t kBytesPerLine = 8 / sizeof(P);  // of the mask, for a cache line of weights
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    if (i % kBytesPerLine == 0) {
      CHILDTUNE_PREFETCH(param + kPackedBlock + 8 * i);
      CHILDTUNE_PREFETCH(grad + kPackedBlock + 8 * i);
    }
    const uint16_t* in_byte = kPlaceTable.place[byte];
    CHILDTUNE_INDEPENDENT
    for (int j = 0; j < 8; ++j) place[n + j] = static_cast<uint16_t>(in_byte[j] + 8 * i);
    n += kPlaceTable.count[byte];
  }
  return n;
}

template <class P>
CHILDTUNE_OUT_OF_LINE void take(const uint16_t* place, int64_t count, const P* __restrict param,
                                const P* __restrict grad, P* __restrict child_param, P* __restrict child_grad) {
  CHILDTUNE_UNROLL_4
  for (int64_t k = 0; k < count; ++k) {
    child_param[k] = param[place[k]];
    child_grad[k] = grad[place[k]];
  }
}

template <class P>
CHILDTUNE_OUT_OF_LINE void put_back(const uint16_t* place, int64_t count, const P* __restrict child_param,
                                    P* __restrict param) {
  CHILDTUNE_UNROLL_4
  for (int64_t k = 0; k < count; ++k) param[place[k]] = child_param[k];
}

// The child network's weights and gradients of a packed block, in order, and their places in the block.
template <class P>
struct ChildPlaces {
  using Stored = P;
  P param[kPackedBlock], grad[kPackedBlock];
  uint16_t place[kPackedBlock + 8];
  int64_t count = 0;

  template <class Places>
  int64_t compress(const uint8_t* bits, int64_t bytes, const P* from_param, const P* from_grad, Places places) {
    count = find_places(bits, bytes, from_param, from_grad, place);
    take(place, count, from_param, from_grad, param, grad);
    if constexpr (!std::is_null_pointer_v<Places>) {
      for (int64_t k = 0; k < count; ++k) places[k] = kPlaces.of[place[k]];
    }
    return count;
  }

  void expand(const uint8_t*, int64_t, P* to_param, const P*) const { put_back(place, count, param, to_param); }
};

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
