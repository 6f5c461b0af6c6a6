// The passes of a selection over a range of scores; cpu/select.cpp says how they work together.
#pragma once

#include "core/packed_mask.h"
#include "core/score_key.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int64_t kKeys = kPackedBlock;  // at once, in the first-level cache
constexpr int64_t kFewKeys = 32;

bool count_upper_halves(const float* scores, int64_t count, uint32_t flip, int64_t* counts) {
  uint32_t nan = 0;
  for (int64_t at = 0; at < count; at += kKeys) {
    const int64_t n = count - at < kKeys ? count - at : kKeys;
    uint32_t keys[kKeys];
    fetch_ahead(scores + at, kKeys);
    for (int64_t j = 0; j < n; ++j) {
      nan |= nan_bit(scores[at + j]);
      keys[j] = score_key(scores[at + j], flip);
    }
    for (int64_t j = 0; j < n; ++j) ++counts[keys[j] >> 16];
  }
  return nan >> 31;
}

void count_lower_halves(const float* scores, int64_t count, uint32_t flip, uint32_t upper, int64_t* counts) {
  const auto count_key = [&](uint32_t key) { counts[key & 0xFFFFu] += key >> 16 == upper; };
  int64_t at = 0;
  for (; at + kFewKeys <= count; at += kFewKeys) {
    fetch_ahead(scores + at, kFewKeys);
    uint32_t found = 0;  // few keys have this upper half, so a vectorised test passes over most groups
    for (int64_t j = at; j < at + kFewKeys; ++j) found |= score_key(scores[j], flip) >> 16 == upper;
    if (!found) continue;
    for (int64_t j = at; j < at + kFewKeys; ++j) count_key(score_key(scores[j], flip));
  }
  for (; at < count; ++at) count_key(score_key(scores[at], flip));
}

// Writes the bits of kKeys keys: whether each is above the threshold.
CHILDTUNE_INLINE void pack_above(const uint32_t* keys, uint32_t threshold, uint8_t* bits) {
#if defined(CHILDTUNE_AVX512)
  for (int64_t i = 0; i < kKeys / 16; ++i) {
    const __m512i key = _mm512_loadu_si512(keys + 16 * i);
    const uint16_t above = _mm512_cmpgt_epu32_mask(key, _mm512_set1_epi32(static_cast<int>(threshold)));
    memcpy(bits + 2 * i, &above, sizeof above);
  }
#elif defined(CHILDTUNE_AVX2)
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);  // AVX2 has signed comparisons only
  const __m256i signed_threshold = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(threshold)), sign);
  for (int64_t i = 0; i < kKeys / 8; ++i) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_xor_si256(key, sign), signed_threshold);
    bits[i] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
  }
#else
  uint8_t above[kKeys];
  for (int64_t j = 0; j < kKeys; ++j) above[j] = keys[j] > threshold;
  for (int64_t i = 0; i < kKeys / 8; ++i) {
    uint64_t flags = 0;  // flag j of eight in bits 8 j
    for (int j = 0; j < 8; ++j) flags |= uint64_t{above[8 * i + j]} << (8 * j);
    bits[i] = static_cast<uint8_t>(flags * 0x0102040810204080u >> 56);  // in bit j
  }
#endif
}

int64_t write_above(const float* scores, int64_t count, uint32_t flip, uint32_t threshold, uint8_t* bits) {
  int64_t ties = 0;
  for (int64_t at = 0; at < count; at += kKeys) {
    const int64_t n = count - at < kKeys ? count - at : kKeys;
    uint32_t keys[kKeys];
    fetch_ahead(scores + at, kKeys);
    uint32_t equal = 0;
    for (int64_t j = 0; j < n; ++j) {
      keys[j] = score_key(scores[at + j], flip);
      equal += keys[j] == threshold;
    }
    for (int64_t j = n; j < kKeys; ++j) keys[j] = 0;  // below every score
    ties += equal;
    pack_above(keys, threshold, bits + at / 8);
  }
  return ties;
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
