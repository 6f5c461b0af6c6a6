// Sixteen neighbouring 16-bit weights at once, to floats and back, with the results of core/dtypes.h.
//
// A loop that computes with floats but loads and stores 16-bit numbers is compiled to vectors of half the width. So the
// conversion is a step of its own, by the processor's instructions where it has them. The only inputs for which these
// differ from core/dtypes.h are NaNs.
#pragma once

#include "core/dtypes.h"
#include "core/mask.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kLanes = kMaskCounters;  // elements per inner loop: a whole number of vectors in every set

#if defined(CHILDTUNE_AVX512)

constexpr int kFloats = 16;  // in a vector
using Floats = __m512;
using Halves = __m256i;  // as many 16-bit numbers

CHILDTUNE_INLINE Halves load_halves(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
CHILDTUNE_INLINE void store_halves(void* to, Halves x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
CHILDTUNE_INLINE Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
CHILDTUNE_INLINE void store_floats(float* to, Floats x) { _mm512_storeu_ps(to, x); }

// Returns x with every NaN replaced by the one that core/dtypes.h stores.
CHILDTUNE_INLINE Floats one_nan(Floats x) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
}

// Between a bfloat16 and the upper half of a float a permutation is one instruction, where a shift needs another one.
alignas(64) constexpr uint16_t kToUpperHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                     0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
alignas(64) constexpr uint16_t kUpperHalves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

CHILDTUNE_INLINE Floats widen(BFloat16, Halves x) {
  constexpr __mmask32 kUpper = 0xAAAAAAAA;
  const __m512i halves = _mm512_castsi256_si512(x);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, _mm512_load_si512(kToUpperHalves), halves));
}
CHILDTUNE_INLINE Halves narrow(BFloat16, Floats x) {
  const __m512i bits = _mm512_castps_si512(one_nan(x));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
  const __m512i added = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_mask_sub_epi32(added, odd, added, _mm512_set1_epi32(-1));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpperHalves), rounded));
}
CHILDTUNE_INLINE Floats widen(Float16, Halves x) { return _mm512_cvtph_ps(x); }
CHILDTUNE_INLINE Halves narrow(Float16, Floats x) {
  return _mm512_cvtps_ph(one_nan(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(CHILDTUNE_AVX2)

constexpr int kFloats = 8;
using Floats = __m256;
using Halves = __m128i;

CHILDTUNE_INLINE Halves load_halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
CHILDTUNE_INLINE void store_halves(void* to, Halves x) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }
CHILDTUNE_INLINE Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
CHILDTUNE_INLINE void store_floats(float* to, Floats x) { _mm256_storeu_ps(to, x); }

CHILDTUNE_INLINE Floats one_nan(Floats x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

CHILDTUNE_INLINE Floats widen(BFloat16, Halves x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
CHILDTUNE_INLINE Halves narrow(BFloat16, Floats x) {
  const __m256i bits = _mm256_castps_si256(one_nan(x));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
CHILDTUNE_INLINE Floats widen(Float16, Halves x) { return _mm256_cvtph_ps(x); }
CHILDTUNE_INLINE Halves narrow(Float16, Floats x) {
  return _mm256_cvtps_ph(one_nan(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#endif

// Converts kLanes weights to floats.
template <class P>
CHILDTUNE_INLINE void widen_lanes(const P* from, float* to) {
#if defined(CHILDTUNE_AVX2)
  for (int j = 0; j < kLanes; j += kFloats) store_floats(to + j, widen(P{}, load_halves(from + j)));
#else
  for (int j = 0; j < kLanes; ++j) to[j] = load(from[j]);
#endif
}

// Converts kLanes floats to weights.
template <class P>
CHILDTUNE_INLINE void narrow_lanes(const float* from, P* to) {
#if defined(CHILDTUNE_AVX2)
  for (int j = 0; j < kLanes; j += kFloats) store_halves(to + j, narrow(P{}, load_floats(from + j)));
#else
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) store(to[j], from[j]);
#endif
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
