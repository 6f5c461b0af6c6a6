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
#define CHILDTUNE_AVX2
#define CHILDTUNE_FETCH_AHEAD 1024
#include "cpu/isa_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
