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

// Five more have no default. CHILDTUNE_AVX2 and CHILDTUNE_AVX512 say which intrinsics there are; isa_avx512.cpp defines
// both. For cpu/mask_lanes.h, CHILDTUNE_VECTOR is the type of an integer vector, CHILDTUNE_VECTOR_BYTES its size, and
// CHILDTUNE_MULTIPLY_LOW the product of the low halves of its 64-bit lanes.
