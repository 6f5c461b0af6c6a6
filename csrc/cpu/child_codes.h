// The state of a child network's values in bytes, to floats and back: the values of a part of a packed block, which lie
// in order in buffers, in one loop, though each of its up to eight blocks has scales and random words of its own.
//
// A value's place (cpu/spread.h) has the number of its block. Eight blocks are as many as AVX2 has floats in a
// register, so that one instruction finds what the blocks of eight values have.
#pragma once

#include "core/codes.h"
#include "core/packed_mask.h"
#include "core/rounding.h"
#include "cpu/code_lanes.h"
#include "cpu/half_lanes.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kPartBlocks = kPackedBlock / kMaskBlock;

// A number for each block of a part.
template <class T>
struct PerBlock {
  alignas(32) T of[kPartBlocks];
};

// What encoding an array of a part takes; see Encoding.
struct PartEncoding {
  PerBlock<float> inverse;
  PerBlock<int32_t> least;
  PerBlock<uint32_t> word;  // XOR the block's number, so that this vanishes from its XOR with a place
};

// The four functions take kLanes values. found returns what the blocks of the values at `places` have. A permutation
// reads the low bits of each place, three of eight numbers and four of sixteen: the three are a block's number and the
// fourth is 0, so that the upper eight, which are undefined, are never read.
#if defined(CHILDTUNE_AVX512)

CHILDTUNE_INLINE __m512i load_places(const uint32_t* places) { return _mm512_loadu_si512(places); }
CHILDTUNE_INLINE __m512 found(const PerBlock<float>& numbers, __m512i places) {
  return _mm512_permutexvar_ps(places, _mm512_castps256_ps512(_mm256_load_ps(numbers.of)));
}
template <class T>
CHILDTUNE_INLINE __m512i found(const PerBlock<T>& numbers, __m512i places) {
  const __m256i eight = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers.of));
  return _mm512_permutexvar_epi32(places, _mm512_castsi256_si512(eight));
}
CHILDTUNE_INLINE __m512i found_bits(const PerBlock<uint32_t>& words, __m512i places) {
  return _mm512_xor_si512(found(words, places), places);
}

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                           float* values) {
  decode_average_sixteen(codes, found(factors, load_places(places)), values);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                          float* values) {
  decode_square_sixteen(codes, found(factors, load_places(places)), values);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* values, const PartEncoding& e, const uint32_t* places,
                                           uint8_t* codes) {
  const __m512i of = load_places(places);
  encode_average_sixteen(values, found(e.inverse, of), found_bits(e.word, of), codes);
}

CHILDTUNE_INLINE void encode_square_lanes(const float* values, const PartEncoding& e, const uint32_t* places,
                                          uint8_t* codes) {
  const __m512i of = load_places(places);
  encode_square_sixteen(values, found(e.least, of), found_bits(e.word, of), codes);
}

CHILDTUNE_INLINE void random_lanes(const PerBlock<uint32_t>& words, const uint32_t* places, uint32_t* random) {
  _mm512_storeu_si512(random, found_bits(words, load_places(places)));
}

// Returns the bits of the largest magnitudes of a block's values: eight numbers, the largest of which is the block's.
CHILDTUNE_INLINE __m256i largest_of(const float* values, int64_t count) {
  const __m512i all = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most = _mm512_setzero_si512();
  for (; count >= kLanes; count -= kLanes, values += kLanes) {
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(values), all));
  }
  const auto left = static_cast<__mmask16>((1u << count) - 1);
  most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(left, values), all));
  return _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
}

#elif defined(CHILDTUNE_AVX2)

CHILDTUNE_INLINE __m256i load_places(const uint32_t* places) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
}
CHILDTUNE_INLINE __m256 found(const PerBlock<float>& numbers, __m256i places) {
  return _mm256_permutevar8x32_ps(_mm256_load_ps(numbers.of), places);
}
template <class T>
CHILDTUNE_INLINE __m256i found(const PerBlock<T>& numbers, __m256i places) {
  return _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(numbers.of)), places);
}
CHILDTUNE_INLINE __m256i found_bits(const PerBlock<uint32_t>& words, __m256i places) {
  return _mm256_xor_si256(found(words, places), places);
}

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                           float* values) {
  decode_average_eight(codes, found(factors, load_places(places)), values);
  decode_average_eight(codes + 8, found(factors, load_places(places + 8)), values + 8);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                          float* values) {
  decode_square_eight(codes, found(factors, load_places(places)), values);
  decode_square_eight(codes + 8, found(factors, load_places(places + 8)), values + 8);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* values, const PartEncoding& e, const uint32_t* places,
                                           uint8_t* codes) {
  const __m256i first = load_places(places), second = load_places(places + 8);
  store_averages(codes, average_numbers(values, found(e.inverse, first), found_bits(e.word, first)),
                 average_numbers(values + 8, found(e.inverse, second), found_bits(e.word, second)));
}

CHILDTUNE_INLINE void encode_square_lanes(const float* values, const PartEncoding& e, const uint32_t* places,
                                          uint8_t* codes) {
  const __m256i first = load_places(places), second = load_places(places + 8);
  store_squares(codes, square_numbers(values, found(e.least, first), found_bits(e.word, first)),
                square_numbers(values + 8, found(e.least, second), found_bits(e.word, second)));
}

CHILDTUNE_INLINE void random_lanes(const PerBlock<uint32_t>& words, const uint32_t* places, uint32_t* random) {
  for (int j = 0; j < kLanes; j += 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(random + j), found_bits(words, load_places(places + j)));
  }
}

// Returns the bits of the largest magnitudes of a block's values: eight numbers, the largest of which is the block's.
// Reads up to eight values beyond them.
CHILDTUNE_INLINE __m256i largest_of(const float* values, int64_t count) {
  constexpr uint32_t kAll = 0x7FFFFFFF;
  alignas(32) static constexpr uint32_t kFirst[16] = {kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll};
  const auto* eights = reinterpret_cast<const __m256i*>(values);
  __m256i most = _mm256_setzero_si256();
  for (; count >= 8; count -= 8, ++eights) {
    const __m256i bits = _mm256_and_si256(_mm256_loadu_si256(eights), _mm256_set1_epi32(kAll));
    most = _mm256_max_epi32(most, bits);
  }
  return _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256(eights), load_places(kFirst + 8 - count)));
}

#endif

#if defined(CHILDTUNE_AVX2)

CHILDTUNE_INLINE __m256i larger_of_words(__m256i a, __m256i b) {
  return _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}
CHILDTUNE_INLINE __m256i larger_of_pairs(__m256i a, __m256i b) {
  return _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// Returns the largest number of each row.
CHILDTUNE_INLINE __m256i largest_of_each(const __m256i* rows) {
  const __m256i first = larger_of_pairs(larger_of_words(rows[0], rows[1]), larger_of_words(rows[2], rows[3]));
  const __m256i second = larger_of_pairs(larger_of_words(rows[4], rows[5]), larger_of_words(rows[6], rows[7]));
  return _mm256_max_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                          _mm256_permute2x128_si256(first, second, 0x31));
}

#else

template <class T>
CHILDTUNE_INLINE void find_lanes(const PerBlock<T>& numbers, const uint32_t* places, T* found) {
  for (int j = 0; j < kLanes; ++j) found[j] = numbers.of[places[j] % kPartBlocks];
}

CHILDTUNE_INLINE void random_lanes(const PerBlock<uint32_t>& words, const uint32_t* places, uint32_t* random) {
  find_lanes(words, places, random);
  for (int j = 0; j < kLanes; ++j) random[j] ^= places[j];
}

CHILDTUNE_INLINE void decode_average_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                           float* values) {
  float factor[kLanes];
  find_lanes(factors, places, factor);
  for (int j = 0; j < kLanes; ++j) values[j] = decode_average(codes[j], factor[j]);
}

CHILDTUNE_INLINE void decode_square_lanes(const uint8_t* codes, const PerBlock<float>& factors, const uint32_t* places,
                                          float* values) {
  float factor[kLanes];
  find_lanes(factors, places, factor);
  for (int j = 0; j < kLanes; ++j) values[j] = decode_square(codes[j], factor[j]);
}

CHILDTUNE_INLINE void encode_average_lanes(const float* __restrict values, const PartEncoding& e,
                                           const uint32_t* __restrict places, uint8_t* __restrict codes) {
  float inverse[kLanes];
  uint32_t random[kLanes];
  find_lanes(e.inverse, places, inverse);
  random_lanes(e.word, places, random);
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) codes[j] = encode_average(values[j], inverse[j], random[j] << kSpreadShift);
}

CHILDTUNE_INLINE void encode_square_lanes(const float* __restrict values, const PartEncoding& e,
                                          const uint32_t* __restrict places, uint8_t* __restrict codes) {
  int32_t least[kLanes];
  uint32_t random[kLanes];
  find_lanes(e.least, places, least);
  random_lanes(e.word, places, random);
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) codes[j] = encode_square(values[j], least[j], random[j] << kSpreadShift);
}

#endif

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
