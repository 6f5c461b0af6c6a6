// The CPU kernels for x86 processors with AVX2 (2013 and later). Empty elsewhere.
#if defined(__x86_64__) && defined(__GNUC__)
// System headers first: their inline functions must stay plain code, since the linker may share them.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
#define CHILDTUNE_ISA avx2
#define CHILDTUNE_VECTOR_BYTES 32
#define CHILDTUNE_VECTOR __m256i
#define CHILDTUNE_MULTIPLY_LOW _mm256_mul_epu32
#define CHILDTUNE_LOW_HALVES(a, b) \
  _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88))  // of 64-bit lanes
#define CHILDTUNE_AVX2
#define CHILDTUNE_FETCH_AHEAD 1024  // a tenth less time on a Zen 3
#include "cpu/isa_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
