// How the weights of a child network are collected among their neighbours, and put back. Included by
// cpu/child_kernel.h only.
//
// collect: the child network's values among 8 * bytes weights and their gradients, in order; returns how many they are.
// put_back: writes the child network's weights, and nothing beside them. Both touch up to kTogether numbers more than
// that in the buffers; `bytes` is a multiple of kTogether / 8.

constexpr int kTogether = 16;  // weights

// Of each byte of a mask: where its set bits are; how many lie below each bit, with the sign set where the bit itself
// is; and how many there are.
struct ByteTable {
  int8_t place[256][8], rank[256][8];
  uint8_t count[256];

  constexpr ByteTable() : place(), rank(), count() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = byte >> bit & 1;
        rank[byte][bit] = static_cast<int8_t>(set ? count[byte] - 128 : count[byte]);
        if (set) place[byte][count[byte]++] = static_cast<int8_t>(bit);
      }
    }
  }
};
constexpr ByteTable kByteTable;

CHILDTUNE_INLINE int64_t bits_in(uint8_t byte) {
#if defined(CHILDTUNE_AVX2)  // which comes with the instruction
  return __builtin_popcount(byte);
#else
  return kByteTable.count[byte];
#endif
}

CHILDTUNE_INLINE int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t n = 0;
  for (int64_t i = 0; i < bytes; ++i) n += bits_in(bits[i]);
  return n;
}

// collect_eight: of eight weights and their gradients, those at `place`, eight of each whatever the mask.
// put_eight: where the sign in `rank` is set, the value of that rank; elsewhere the weight keeps its bits.
template <class P, class T>
CHILDTUNE_INLINE void collect_eight(const int8_t* place, const P* param, const P* grad, T* child_param, T* child_grad) {
  for (int j = 0; j < 8; ++j) child_param[j] = load(param[place[j]]);
  for (int j = 0; j < 8; ++j) child_grad[j] = load(grad[place[j]]);
}
template <class P, class T>
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const T* child_param, P* param) {
  for (int j = 0; j < 8; ++j) {
    if (rank[j] < 0) store(param[j], child_param[rank[j] + 128]);
  }
}

#if defined(CHILDTUNE_AVX2) && !defined(CHILDTUNE_AVX512)
CHILDTUNE_INLINE __m256i eight_indices(const int8_t* index) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
}
CHILDTUNE_INLINE __m256 load_eight(const float* from) { return _mm256_loadu_ps(from); }
CHILDTUNE_INLINE __m256 load_eight(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
CHILDTUNE_INLINE __m256 load_eight(const Float16* from) {
  float wide[8];
  for (int j = 0; j < 8; ++j) wide[j] = load(from[j]);
  return _mm256_loadu_ps(wide);
}

template <class P>
CHILDTUNE_INLINE void collect_eight(const int8_t* place, const P* param, const P* grad, float* child_param,
                                    float* child_grad) {
  const __m256i index = eight_indices(place);  // its low three bits count
  _mm256_storeu_ps(child_param, _mm256_permutevar8x32_ps(load_eight(param), index));
  _mm256_storeu_ps(child_grad, _mm256_permutevar8x32_ps(load_eight(grad), index));
}
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const float* child_param, float* param) {
  const __m256i index = eight_indices(rank);
  const __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), index);
  _mm256_storeu_ps(param, _mm256_blendv_ps(_mm256_loadu_ps(param), value, _mm256_castsi256_ps(index)));
}
template <class P>
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const float* child_param, P* param) {
  static_assert(sizeof(P) == 2, "bf16 and fp16");
  const __m256i index = eight_indices(rank);
  float value[8];
  P stored[8];
  _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), index));
  for (int j = 0; j < 8; ++j) store(stored[j], value[j]);
  const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1));
  const __m128i sign = _mm_srai_epi16(mask, 15), now = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  __m128i* at = reinterpret_cast<__m128i*>(param);
  _mm_storeu_si128(at, _mm_blendv_epi8(_mm_loadu_si128(at), now, sign));
}
#endif

template <class P, class T>
CHILDTUNE_OUT_OF_LINE int64_t collect(const uint8_t* bits, int64_t bytes, const P* param, const P* grad, T* child_param,
                                      T* child_grad) {
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    collect_eight(kByteTable.place[byte], param + 8 * i, grad + 8 * i, child_param + n, child_grad + n);
    n += bits_in(byte);
  }
  return n;
}

// Meanwhile it fetches the next block's weights and gradients, which nothing else would while a step works in the
// cache.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE void put_back(const uint8_t* bits, int64_t bytes, const T* child_param, P* param, const P* grad) {
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    if (i % 2 == 0) {
      CHILDTUNE_PREFETCH(param + kRankBlock + 8 * i);
      CHILDTUNE_PREFETCH(grad + kRankBlock + 8 * i);
    }
    put_eight(kByteTable.rank[byte], child_param, param + 8 * i);
    child_param += bits_in(byte);
  }
}

#if defined(CHILDTUNE_AVX512)

// Sixteen at a time, by the instructions that exist for it. Only the child network's weights are touched in memory.
CHILDTUNE_INLINE __m512 load_sixteen(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
template <class P>
CHILDTUNE_INLINE __m512 load_sixteen(__mmask16 mask, const P* from) {
  static_assert(sizeof(P) == 2, "bf16 and fp16");
  P stored[16];
  float wide[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored), _mm256_maskz_loadu_epi16(mask, from));
  for (int j = 0; j < 16; ++j) wide[j] = load(stored[j]);
  return _mm512_loadu_ps(wide);
}
CHILDTUNE_INLINE void store_sixteen(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
template <class P>
CHILDTUNE_INLINE void store_sixteen(P* to, __mmask16 mask, __m512 value) {
  P stored[16];
  float wide[16];
  _mm512_storeu_ps(wide, value);
  for (int j = 0; j < 16; ++j) store(stored[j], wide[j]);
  _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
}
CHILDTUNE_INLINE __mmask16 sixteen_bits(const uint8_t* bits) {
  uint16_t mask;
  memcpy(&mask, bits, sizeof mask);
  return mask;
}

template <class P>
CHILDTUNE_OUT_OF_LINE int64_t collect(const uint8_t* bits, int64_t bytes, const P* param, const P* grad,
                                      float* child_param, float* child_grad) {
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; i += 2) {
    const __mmask16 mask = sixteen_bits(bits + i);
    fetch_ahead(param + 8 * i, 16);
    fetch_ahead(grad + 8 * i, 16);
    _mm512_storeu_ps(child_param + n, _mm512_maskz_compress_ps(mask, load_sixteen(mask, param + 8 * i)));
    _mm512_storeu_ps(child_grad + n, _mm512_maskz_compress_ps(mask, load_sixteen(mask, grad + 8 * i)));
    n += __builtin_popcount(mask);
  }
  return n;
}

template <class P>
CHILDTUNE_OUT_OF_LINE void put_back(const uint8_t* bits, int64_t bytes, const float* child_param, P* param, const P*) {
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; i += 2) {
    const __mmask16 mask = sixteen_bits(bits + i);
    store_sixteen(param + 8 * i, mask, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(child_param)));
    child_param += __builtin_popcount(mask);
  }
}

#endif
