// What the loops of the CPU kernels ask of the compiler, for compilers that understand it.
#pragma once

// Promises that the iterations of the next loop touch different memory, so that the compiler checks nothing at run time
// before it uses vectors.
#if defined(__clang__)
#define CHILDTUNE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define CHILDTUNE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define CHILDTUNE_INDEPENDENT
#endif

// Unrolls the next loop: four times, or wholly if it is short.
#if defined(__clang__)
#define CHILDTUNE_UNROLL_4 _Pragma("unroll 4")
#define CHILDTUNE_UNROLL _Pragma("unroll 16")
#elif defined(__GNUC__)
#define CHILDTUNE_UNROLL_4 _Pragma("GCC unroll 4")
#define CHILDTUNE_UNROLL _Pragma("GCC unroll 16")
#else
#define CHILDTUNE_UNROLL_4
#define CHILDTUNE_UNROLL
#endif

// Keeps the next loop a loop until it becomes vectors: what GCC has unrolled first, it may leave as it is.
#if defined(__GNUC__) && !defined(__clang__)
#define CHILDTUNE_ROLLED _Pragma("GCC unroll 1")
#else
#define CHILDTUNE_ROLLED
#endif

// Keeps out of line what is called once per many elements: it compiles sooner and leaves the loops their registers.
#if defined(__GNUC__)
#define CHILDTUNE_OUT_OF_LINE static __attribute__((noinline))
#define CHILDTUNE_LAMBDA __attribute__((always_inline))
#define CHILDTUNE_PREFETCH(address) __builtin_prefetch(address)
#else
#define CHILDTUNE_OUT_OF_LINE static
#define CHILDTUNE_LAMBDA
#define CHILDTUNE_PREFETCH(address)
#endif
