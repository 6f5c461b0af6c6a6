// What an instruction set's file (isa_*.cpp) defines before it includes the kernels, with defaults for the plain set
// and for a header that is compiled alone.
#pragma once

// The namespace of everything that is compiled for the set.
#if !defined(CHILDTUNE_ISA)
#define CHILDTUNE_ISA baseline
#endif

// How many bytes ahead of a loop memory is fetched by software prefetch: 0 leaves that to the processor.
#if !defined(CHILDTUNE_FETCH_AHEAD)
#define CHILDTUNE_FETCH_AHEAD 0
#endif

// Others have no default. CHILDTUNE_QUOTIENT_BY_INVERSE says that the set's quotients by a constant are products
// (core/quotient.h). CHILDTUNE_AVX2 and CHILDTUNE_AVX512 say which intrinsics there are; isa_avx512.cpp defines
// both. The others are for cpu/mask_lanes.h; without them, it draws in plain C++. CHILDTUNE_VECTOR_BYTES is the size of
// an integer vector, and CHILDTUNE_NEON says that it is ARM's. Else CHILDTUNE_VECTOR is its type,
// CHILDTUNE_MULTIPLY_LOW the product of the low halves of its 64-bit lanes, and CHILDTUNE_HIGH_TO_LOW, which may be
// missing, moves their high halves to the low ones.
