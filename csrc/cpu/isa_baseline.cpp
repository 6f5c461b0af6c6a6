// The CPU kernels for any processor: whatever vectors the compiler may assume without being told (SSE2, NEON, ...).
#if defined(__SSE2__) && defined(__GNUC__)
#include <emmintrin.h>
#define CHILDTUNE_VECTOR_BYTES 16
#define CHILDTUNE_VECTOR __m128i
#define CHILDTUNE_MULTIPLY_LOW _mm_mul_epu32
#define CHILDTUNE_LOW_HALVES(a, b) \
  _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(a), _mm_castsi128_ps(b), 0x88))  // of 64-bit lanes
#define CHILDTUNE_HIGH_TO_LOW(x) _mm_shuffle_epi32(x, 0xF5)  // which, unlike a shift, needs no copy of x before it
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#define CHILDTUNE_VECTOR_BYTES 16
#define CHILDTUNE_NEON
#endif
#define CHILDTUNE_ISA baseline
#include "cpu/isa_kernels.h"
