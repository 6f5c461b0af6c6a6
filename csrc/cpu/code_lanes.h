// Averages in bytes, to floats and back, sixteen neighbouring values at once, with the results of core/codes.h.
//
// Compilers turn loops over bytes and floats into vectors with twice the instructions that are needed, so the
// conversion is by the processor's own where it has them.
#pragma once

#include "core/codes.h"
#include "cpu/half_lanes.h"
#include "cpu/isa.h"
#include "cpu/loops.h"
#include "cpu/spread.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// What encoding an array of a block takes: of averages `inverse`, of squares `least`.
struct Encoding {
  float inverse;
  int32_t least;
  uint32_t word;  // of core/rounding.h, without the bits that encoding does not take
};

CHILDTUNE_INLINE Encoding encoding_of(uint32_t scale, uint32_t word) {
  return {inverse_scale_of(scale), least_square_of(scale), word >> kSpreadShift};
}

#if defined(CHILDTUNE_AVX2) && !defined(CHILDTUNE_AVX512)

// Eight values, for which what their blocks take may differ.
CHILDTUNE_INLINE void decode_average_eight(const uint8_t* codes, __m256 factor, float* values) {
  const __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256i number =
      _mm256_and_si256(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(static_cast<int>(0x87F00000u)));
  const __m256 shifted = _mm256_castsi256_ps(_mm256_add_epi32(number, _mm256_set1_epi32(kShiftCode << 20)));
  const __m256 sign = _mm256_and_ps(shifted, _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN)));
  const __m256 shift = _mm256_or_ps(sign, _mm256_set1_ps(kShift));
  _mm256_storeu_ps(values, _mm256_mul_ps(_mm256_sub_ps(shifted, shift), factor));
}

CHILDTUNE_INLINE void decode_square_eight(const uint8_t* codes, __m256 factor, float* values) {
  const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(96 << 23));
  _mm256_storeu_ps(values, _mm256_mul_ps(_mm256_castsi256_ps(bits), factor));
}

// Returns kShiftCode and the number of each code, below 2^10, and above it, in bit 11, the sign. `random` has the
// twenty bits of an encoding.
CHILDTUNE_INLINE __m256i average_numbers(const float* values, __m256 inverse, __m256i random) {
  const __m256 value = _mm256_loadu_ps(values);
  const __m256 sign = _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN)));
  const __m256 shift = _mm256_or_ps(sign, _mm256_set1_ps(kShift));
  const __m256i shifted = _mm256_castps_si256(_mm256_add_ps(_mm256_mul_ps(value, inverse), shift));
  return _mm256_srli_epi32(_mm256_add_epi32(shifted, random), 20);
}

CHILDTUNE_INLINE __m256i square_numbers(const float* values, __m256i least, __m256i random) {
  const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(_mm256_loadu_ps(values)), least);
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_max_epi32(above, _mm256_setzero_si256()), random), 20);
}

// Returns sixteen numbers below 2^15, given in order as 32 bits each, as 16 bits each.
CHILDTUNE_INLINE __m256i as_words(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
}
// Stores the low bytes of sixteen numbers below 2^15.
CHILDTUNE_INLINE void store_words(uint8_t* codes, __m256i words) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Store the codes of sixteen numbers, which average_numbers and square_numbers returned.
CHILDTUNE_INLINE void store_averages(uint8_t* codes, __m256i first, __m256i second) {
  const __m256i words = as_words(first, second), number = _mm256_and_si256(words, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(words, 4), _mm256_set1_epi16(0x80));
  store_words(codes, _mm256_or_si256(number, sign));
}
CHILDTUNE_INLINE void store_squares(uint8_t* codes, __m256i first, __m256i second) {
  store_words(codes, as_words(first, second));
}

#endif

#if defined(CHILDTUNE_AVX512)

// Results of three operands, bit by bit.
constexpr int kAndOr = 0xEA, kChoose = 0xCA;  // (a & b) | c, a ? b : c

// Sixteen values, for which what their blocks take may differ. `random` has the twenty bits of an encoding.
CHILDTUNE_INLINE void decode_average_sixteen(const uint8_t* codes, __m512 factor, float* values) {
  const __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i moved = _mm512_slli_epi32(code, 20);
  const __m512i shifted =
      _mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(static_cast<int>(0x87F00000u)),
                                _mm512_set1_epi32(kShiftCode << 20), kAndOr);  // whose bits no code has
  const __m512i shift = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(INT32_MIN),
                                                  _mm512_castps_si512(_mm512_set1_ps(kShift)), kAndOr);
  const __m512 number = _mm512_sub_ps(_mm512_castsi512_ps(shifted), _mm512_castsi512_ps(shift));
  store_floats(values, _mm512_mul_ps(number, factor));
}

CHILDTUNE_INLINE void decode_square_sixteen(const uint8_t* codes, __m512 factor, float* values) {
  const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(96 << 23));
  store_floats(values, _mm512_mul_ps(_mm512_castsi512_ps(bits), factor));
}

CHILDTUNE_INLINE void store_codes(uint8_t* codes, __m512i numbers) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(numbers));
}

CHILDTUNE_INLINE void encode_average_sixteen(const float* values, __m512 inverse, __m512i random, uint8_t* codes) {
  const __m512 value = load_floats(values);
  // Rounded once as well as twice: the product is exact, or too small to matter beside kShift.
  const __m512 shifted = _mm512_fmadd_ps(_mm512_abs_ps(value), inverse, _mm512_set1_ps(kShift));
  const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(shifted), random);
  const __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(value), 24);
  store_codes(codes, _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7F), _mm512_srli_epi32(rounded, 20), sign, kChoose));
}

CHILDTUNE_INLINE void encode_square_sixteen(const float* values, __m512i least, __m512i random, uint8_t* codes) {
  const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(load_floats(values)), least);
  const __m512i rounded = _mm512_add_epi32(_mm512_max_epi32(above, _mm512_setzero_si512()), random);
  store_codes(codes, _mm512_srli_epi32(rounded, 20));
}

CHILDTUNE_INLINE __m512i added_bits(const Encoding& e, const uint32_t* spread) {
  return _mm512_xor_si512(_mm512_set1_epi32(static_cast<int>(e.word)), _mm512_loadu_si512(spread));
}

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, float factor, float* values) {
  decode_average_sixteen(codes, _mm512_set1_ps(factor), values);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, float factor, float* values) {
  decode_square_sixteen(codes, _mm512_set1_ps(factor), values);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* values, const Encoding& e, const uint32_t* spread,
                                           uint8_t* codes) {
  encode_average_sixteen(values, _mm512_set1_ps(e.inverse), added_bits(e, spread), codes);
}

CHILDTUNE_INLINE void encode_square_lanes(const float* values, const Encoding& e, const uint32_t* spread,
                                          uint8_t* codes) {
  encode_square_sixteen(values, _mm512_set1_epi32(e.least), added_bits(e, spread), codes);
}

#elif defined(CHILDTUNE_AVX2)

CHILDTUNE_INLINE __m256i added_bits(const Encoding& e, const uint32_t* spread) {
  return _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(e.word)),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(spread)));
}

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, float factor, float* values) {
  decode_average_eight(codes, _mm256_set1_ps(factor), values);
  decode_average_eight(codes + 8, _mm256_set1_ps(factor), values + 8);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, float factor, float* values) {
  decode_square_eight(codes, _mm256_set1_ps(factor), values);
  decode_square_eight(codes + 8, _mm256_set1_ps(factor), values + 8);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* values, const Encoding& e, const uint32_t* spread,
                                           uint8_t* codes) {
  const __m256 inverse = _mm256_set1_ps(e.inverse);
  store_averages(codes, average_numbers(values, inverse, added_bits(e, spread)),
                 average_numbers(values + 8, inverse, added_bits(e, spread + 8)));
}

CHILDTUNE_INLINE void encode_square_lanes(const float* values, const Encoding& e, const uint32_t* spread,
                                          uint8_t* codes) {
  const __m256i least = _mm256_set1_epi32(e.least);
  store_squares(codes, square_numbers(values, least, added_bits(e, spread)),
                square_numbers(values + 8, least, added_bits(e, spread + 8)));
}

#else

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, float factor, float* values) {
  for (int j = 0; j < kLanes; ++j) values[j] = decode_average(codes[j], factor);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, float factor, float* values) {
  for (int j = 0; j < kLanes; ++j) values[j] = decode_square(codes[j], factor);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* __restrict values, const Encoding& e,
                                           const uint32_t* __restrict spread, uint8_t* __restrict codes) {
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) {
    codes[j] = encode_average(values[j], e.inverse, (e.word ^ spread[j]) << kSpreadShift);
  }
}

CHILDTUNE_INLINE void encode_square_lanes(const float* __restrict values, const Encoding& e,
                                          const uint32_t* __restrict spread, uint8_t* __restrict codes) {
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) {
    codes[j] = encode_square(values[j], e.least, (e.word ^ spread[j]) << kSpreadShift);
  }
}

#endif

// Returns the bits of the largest magnitude of the first `count` values; `lanes`, a multiple of kLanes, are there.
CHILDTUNE_OUT_OF_LINE uint32_t largest_bits(const float* values, int64_t count, int64_t lanes) {
  int32_t most = 0;  // signed, because SSE2 to AVX2 have no better maximum
  const int32_t end = static_cast<int32_t>(count), all = static_cast<int32_t>(lanes);
  for (int32_t j = 0; j < all; ++j) {
    const int32_t bits = static_cast<int32_t>(bits_of(values[j]) & (j < end ? 0x7FFFFFFFu : 0u));
    most = most < bits ? bits : most;
  }
  return static_cast<uint32_t>(most);
}

#if defined(CHILDTUNE_AVX512)

// Finds the bits of the largest magnitudes of a block's averages, kLanes at a time. Squares have no sign but as NaN.
class LargestOfBlock {
 public:
  CHILDTUNE_MEMBER void begin() { averages_ = squares_ = _mm512_setzero_si512(); }
  CHILDTUNE_MEMBER void take(const float* exp_avg, const float* exp_avg_sq) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(exp_avg), _mm512_set1_epi32(0x7FFFFFFF));
    averages_ = _mm512_max_epu32(averages_, magnitude);
    squares_ = _mm512_max_epu32(squares_, _mm512_loadu_si512(exp_avg_sq));
  }
  CHILDTUNE_MEMBER uint32_t average(const float*) const { return _mm512_reduce_max_epu32(averages_); }
  CHILDTUNE_MEMBER uint32_t square(const float*) const { return _mm512_reduce_max_epu32(squares_); }

 private:
  __m512i averages_, squares_;
};

#else

// The same by a second look at the whole block: other sets have no registers left in the loop.
class LargestOfBlock {
 public:
  CHILDTUNE_MEMBER void begin() {}
  CHILDTUNE_MEMBER void take(const float*, const float*) {}
  CHILDTUNE_MEMBER uint32_t average(const float* exp_avg) const {
    return largest_bits(exp_avg, kCodeBlock, kCodeBlock);
  }
  CHILDTUNE_MEMBER uint32_t square(const float* exp_avg_sq) const {
    return largest_bits(exp_avg_sq, kCodeBlock, kCodeBlock);
  }
};

#endif

// Returns the number of P that core/dtypes.h's store_random stores, or a float that store rounds to it. `random` has
// the twenty bits of an encoding.
CHILDTUNE_INLINE float rounded_randomly(BFloat16, float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  const float rounded = bit_cast<float>((bits + (random >> 4)) & 0xFFFF0000u);
  return (bits & 0x7FFFFFFFu) < 0x7F7F0000u ? rounded : x;
}

CHILDTUNE_INLINE float rounded_randomly(Float16, float x, uint32_t random) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = bits & 0x80000000u, added = random >> 7;
  const float shifted = bit_cast<float>(magnitude) + 0x1p-14f;
  const float subnormal = bit_cast<float>((bits_of(shifted) + added) & 0xFFFFE000u) - 0x1p-14f;
  const float normal = bit_cast<float>((magnitude + added) & 0xFFFFE000u);
  const float rounded = bit_cast<float>(bits_of(magnitude < 0x38800000u ? subnormal : normal) | sign);
  return magnitude < 0x477FE000u ? rounded : x;
}

CHILDTUNE_INLINE float rounded_randomly(float, float x, uint32_t) { return x; }

// Rounds floats stochastically to numbers that P holds, so that storing them as P changes none.
template <class P>
CHILDTUNE_OUT_OF_LINE void round_randomly(float* values, int64_t count, uint32_t word,
                                          const uint32_t* __restrict spread) {
  const uint32_t of_block = word >> kSpreadShift;
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) values[j] = rounded_randomly(P{}, values[j], of_block ^ spread[j]);
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
