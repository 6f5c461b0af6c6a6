// What an instruction set's file (isa_*.cpp) defines before it includes the kernels, and what holds where none did.
#pragma once

// The namespace of everything that is compiled for the set.
#if !defined(CHILDTUNE_ISA)
#define CHILDTUNE_ISA baseline
#endif

// How many bytes ahead of a loop memory is fetched by software prefetch: 0 leaves that to the processor.
#if !defined(CHILDTUNE_FETCH_AHEAD)
#define CHILDTUNE_FETCH_AHEAD 0
#endif

// These have no default: CHILDTUNE_AVX2, which isa_avx512.cpp defines too; CHILDTUNE_AVX512; and, for cpu/mask_lanes.h,
// CHILDTUNE_VECTOR_BYTES, CHILDTUNE_VECTOR and CHILDTUNE_MULTIPLY_LOW.
