// The CPU kernels for x86 processors with AVX-512 (F, BW, DQ, VL). Empty elsewhere, and where a build just in time
// knows that the processor has none.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(CHILDTUNE_NO_AVX512)
// System headers first: their inline functions must stay plain code, since the linker may share them.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
// These warn of code in a header of GCC itself: GCC bug 105593.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define CHILDTUNE_ISA avx512
#define CHILDTUNE_VECTOR_BYTES 64
#define CHILDTUNE_VECTOR __m512i
#define CHILDTUNE_MULTIPLY_LOW _mm512_mul_epu32
#define CHILDTUNE_LOW_HALVES(a, b) \
  _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88))  // of 64-bit lanes
#define CHILDTUNE_AVX2
#define CHILDTUNE_AVX512
#define CHILDTUNE_QUOTIENT_BY_INVERSE  // Intel's dividers take longer for 16 floats than everything else of an update
#define CHILDTUNE_FETCH_AHEAD 3072     // a tenth less time on an Intel Xeon
#include "cpu/isa_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
