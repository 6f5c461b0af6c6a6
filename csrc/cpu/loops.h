// What the loops of cpu/step_kernel.h ask of the compiler, for those that understand it.
#pragma once

// The iterations of the loop below touch different memory: no checks at run time before using vectors.
#if defined(__clang__)
#define CHILDTUNE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define CHILDTUNE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define CHILDTUNE_INDEPENDENT
#endif

#if defined(__clang__)
#define CHILDTUNE_UNROLL_4 _Pragma("unroll 4")
#elif defined(__GNUC__)
#define CHILDTUNE_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define CHILDTUNE_UNROLL_4
#endif

// What is called once per many elements stays out of line: it compiles sooner and leaves the loops their registers.
#if defined(__GNUC__)
#define CHILDTUNE_OUT_OF_LINE static __attribute__((noinline))
#define CHILDTUNE_LAMBDA __attribute__((always_inline))
#define CHILDTUNE_PREFETCH(address) __builtin_prefetch(address)
#else
#define CHILDTUNE_OUT_OF_LINE static
#define CHILDTUNE_LAMBDA
#define CHILDTUNE_PREFETCH(address)
#endif
