// All kernels of one instruction set, in a namespace of their own (CHILDTUNE_ISA). Included by isa_*.cpp, behind their
// target pragmas.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/norm_kernel.h"
#include "cpu/select_kernel.h"
#include "cpu/squares_kernel.h"
#include "cpu/step_kernel.h"

#define CHILDTUNE_STRING_(x) #x
#define CHILDTUNE_STRING(x) CHILDTUNE_STRING_(x)

namespace childtune {
namespace CHILDTUNE_ISA {

CpuKernels kernels() {
  return {CHILDTUNE_STRING(CHILDTUNE_ISA),
          step,
          sum_of_squares,
          accumulate_squares,
          count_upper_halves,
          count_lower_halves,
          write_above};
}

}  // namespace CHILDTUNE_ISA
}  // namespace childtune
