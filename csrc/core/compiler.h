// What the core headers need from the compiler: macros for functions that run on host and device, and a bit cast.
//
// Everything in csrc/core is `static` and always inlined, so that each instruction set's translation unit keeps its own
// copy: were the linker free to merge them, a plain CPU could end up running a function compiled for AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CHILDTUNE_INLINE static __host__ __device__ __forceinline__
#define CHILDTUNE_MEMBER __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define CHILDTUNE_INLINE static inline __attribute__((always_inline))
#define CHILDTUNE_MEMBER inline __attribute__((always_inline))
#else
#define CHILDTUNE_INLINE static inline
#define CHILDTUNE_MEMBER inline
#endif

// On a GPU, an array that a loop indexes stays in registers only if the loop is unrolled.
#if defined(__CUDA_ARCH__)
#define CHILDTUNE_UNROLLED _Pragma("unroll")
#else
#define CHILDTUNE_UNROLLED
#endif

namespace childtune {

template <class To, class From>
CHILDTUNE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes must agree");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A floating-point number's bits.
CHILDTUNE_INLINE uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
CHILDTUNE_INLINE uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }

}  // namespace childtune
