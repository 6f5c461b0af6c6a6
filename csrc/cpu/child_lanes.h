// How the weights of a child network are moved out from among their neighbours, and back: ChildBuffers, by the shortest
// way that the instruction set has.
//
// compress copies the child network's weights and gradients, of 8 * bytes, to the buffers, in order, and returns how
// many they are. expand writes the child network's weights back, and no others. `bytes` is a multiple of kTogether / 8.
// Both touch up to kTogether numbers beyond the child network's in the buffers. compress also writes the weights'
// places (cpu/spread.h), unless it is given nullptr for them.
#pragma once

#include <cstddef>
#include <type_traits>

#include "core/dtypes.h"
#include "core/packed_mask.h"
#include "cpu/child_places.h"
#include "cpu/half_lanes.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/loops.h"
#include "cpu/spread.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kTogether = 16;  // weights

CHILDTUNE_INLINE std::nullptr_t advanced(std::nullptr_t, int64_t) { return nullptr; }
CHILDTUNE_INLINE uint32_t* advanced(uint32_t* places, int64_t count) { return places + count; }

#if defined(CHILDTUNE_AVX2)

#if !defined(CHILDTUNE_AVX512)

// What each byte of a mask does to eight weights. compress[byte][k]: the place of the k-th set bit. expand[byte][i]:
// how many bits are set below bit i, with the sign bit set if bit i itself is. count[byte]: how many bits are set.
struct ByteTable {
  int8_t compress[256][8], expand[256][8];
  uint8_t count[256];

  constexpr ByteTable() : compress(), expand(), count() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = byte >> bit & 1;
        expand[byte][bit] = static_cast<int8_t>(set ? count[byte] - 128 : count[byte]);
        if (set) compress[byte][count[byte]++] = static_cast<int8_t>(bit);
      }
    }
  }
};
constexpr ByteTable kByteTable;

// A row of ByteTable as the permutation instruction takes it; that reads only the low three bits of each index.
CHILDTUNE_INLINE __m256i eight_indices(const int8_t* index) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
}
CHILDTUNE_INLINE __m256 load_eight(const float* from) { return _mm256_loadu_ps(from); }
template <class P>
CHILDTUNE_INLINE __m256 load_eight(const P* from) {
  return widen(P{}, load_halves(from));
}

// `index` is a row of ByteTable. compress_eight writes eight weights and eight gradients whatever the mask is.
// expand_eight writes the weights where the sign in `index` is set; the others keep their bits.
template <class P>
CHILDTUNE_INLINE void compress_eight(__m256i indices, const P* param, const P* grad, float* child_param,
                                     float* child_grad) {
  _mm256_storeu_ps(child_param, _mm256_permutevar8x32_ps(load_eight(param), indices));
  _mm256_storeu_ps(child_grad, _mm256_permutevar8x32_ps(load_eight(grad), indices));
}
CHILDTUNE_INLINE void compress_eight(__m256i, const uint32_t*, std::nullptr_t) {}
CHILDTUNE_INLINE void compress_eight(__m256i indices, const uint32_t* places, uint32_t* child_places) {
  const __m256i of_eight = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(child_places), _mm256_permutevar8x32_epi32(of_eight, indices));
}
CHILDTUNE_INLINE void expand_eight(const int8_t* index, const float* child_param, float* param) {
  const __m256i indices = eight_indices(index);
  const __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), indices);
  _mm256_storeu_ps(param, _mm256_blendv_ps(_mm256_loadu_ps(param), value, _mm256_castsi256_ps(indices)));
}
template <class P>
CHILDTUNE_INLINE void expand_eight(const int8_t* index, const float* child_param, P* param) {
  static_assert(sizeof(P) == 2, "bf16 and fp16");
  const __m256i indices = eight_indices(index);
  const __m128i now = narrow(P{}, _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), indices));
  const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(indices), _mm256_extracti128_si256(indices, 1));
  const __m128i sign = _mm_srai_epi16(mask, 15);
  __m128i* at = reinterpret_cast<__m128i*>(param);
  _mm_storeu_si128(at, _mm_blendv_epi8(_mm_loadu_si128(at), now, sign));
}

template <class P, class T, class Places>
CHILDTUNE_OUT_OF_LINE int64_t compress(const uint8_t* bits, int64_t bytes, const P* param, const P* grad,
                                       T* child_param, T* child_grad, Places places) {
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    const __m256i indices = eight_indices(kByteTable.compress[byte]);
    compress_eight(indices, param + 8 * i, grad + 8 * i, child_param + n, child_grad + n);
    compress_eight(indices, kPlaces.of + 8 * i, advanced(places, n));
    n += __builtin_popcount(byte);
  }
  return n;
}

// Also fetches the next packed block's weights and gradients: the step works in the cache, so memory is idle.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE void expand(const uint8_t* bits, int64_t bytes, const T* child_param, P* param, const P* grad) {
  constexpr int64_t kBytesPerLine = 8 / sizeof(P);  // of the mask, for a cache line of weights
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    if (i % kBytesPerLine == 0) {
      CHILDTUNE_PREFETCH(param + kPackedBlock + 8 * i);
      CHILDTUNE_PREFETCH(grad + kPackedBlock + 8 * i);
    }
    expand_eight(kByteTable.expand[byte], child_param, param + 8 * i);
    child_param += __builtin_popcount(byte);
  }
}

#else

// AVX-512 has instructions that compress and expand, sixteen at a time. Only the child network's weights are touched in
// memory.
CHILDTUNE_INLINE __m512 load_sixteen(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
template <class P>
CHILDTUNE_INLINE __m512 load_sixteen(__mmask16 mask, const P* from) {
  static_assert(sizeof(P) == 2, "bf16 and fp16");
  return widen(P{}, _mm256_maskz_loadu_epi16(mask, from));
}
CHILDTUNE_INLINE void store_sixteen(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
template <class P>
CHILDTUNE_INLINE void store_sixteen(P* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, narrow(P{}, value));
}
CHILDTUNE_INLINE void compress_sixteen(__mmask16, const uint32_t*, std::nullptr_t) {}
CHILDTUNE_INLINE void compress_sixteen(__mmask16 mask, const uint32_t* places, uint32_t* child_places) {
  _mm512_storeu_si512(child_places, _mm512_maskz_compress_epi32(mask, _mm512_load_si512(places)));
}
CHILDTUNE_INLINE __mmask16 sixteen_bits(const uint8_t* bits) {
  uint16_t mask;
  memcpy(&mask, bits, sizeof mask);
  return mask;
}

template <class P, class Places>
CHILDTUNE_OUT_OF_LINE int64_t compress(const uint8_t* bits, int64_t bytes, const P* param, const P* grad,
                                       float* child_param, float* child_grad, Places places) {
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; i += 2) {
    const __mmask16 mask = sixteen_bits(bits + i);
    fetch_ahead(param + 8 * i, 16);
    fetch_ahead(grad + 8 * i, 16);
    _mm512_storeu_ps(child_param + n, _mm512_maskz_compress_ps(mask, load_sixteen(mask, param + 8 * i)));
    _mm512_storeu_ps(child_grad + n, _mm512_maskz_compress_ps(mask, load_sixteen(mask, grad + 8 * i)));
    compress_sixteen(mask, kPlaces.of + 8 * i, advanced(places, n));
    n += __builtin_popcount(mask);
  }
  return n;
}

template <class P>
CHILDTUNE_OUT_OF_LINE void expand(const uint8_t* bits, int64_t bytes, const float* child_param, P* param, const P*) {
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; i += 2) {
    const __mmask16 mask = sixteen_bits(bits + i);
    store_sixteen(param + 8 * i, mask, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(child_param)));
    child_param += __builtin_popcount(mask);
  }
}

#endif

template <class P>
struct ChildLanes {
  using Stored = float;
  float param[kPackedBlock + kTogether] = {}, grad[kPackedBlock + kTogether] = {};

  template <class Places>
  int64_t compress(const uint8_t* bits, int64_t bytes, const P* from_param, const P* from_grad, Places places) {
    return CHILDTUNE_ISA::compress(bits, bytes, from_param, from_grad, param, grad, places);
  }

  void expand(const uint8_t* bits, int64_t bytes, P* to_param, const P* from_grad) const {
    CHILDTUNE_ISA::expand(bits, bytes, param, to_param, from_grad);
  }
};
// No set moves doubles by lanes.
template <class P>
using ChildBuffers = std::conditional_t<sizeof(P) == 8, ChildPlaces<P>, ChildLanes<P>>;

#else

template <class P>
using ChildBuffers = ChildPlaces<P>;

#endif

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
