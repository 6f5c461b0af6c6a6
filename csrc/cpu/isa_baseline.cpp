// The CPU kernels for any processor: whatever vectors the compiler may assume without being told (SSE2, NEON, ...).
#define CHILDTUNE_ISA baseline
#include "cpu/isa_kernels.h"
