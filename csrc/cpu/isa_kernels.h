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

namespace {

// A kernel that leaves no upper halves of AVX registers in use, beside which code of 128 bits is slow: GCC forgets them
// where a function returns right after a call of another one of this file.
template <auto kKernel>
struct Leaving;
template <class Result, class... Args, Result (*kKernel)(Args...)>
struct Leaving<kKernel> {
  struct Leave {
#if defined(CHILDTUNE_AVX2)
    CHILDTUNE_MEMBER ~Leave() { _mm256_zeroupper(); }
#endif
  };
  static Result call(Args... args) {
    [[maybe_unused]] const Leave leave;
    return kKernel(args...);
  }
};

}  // namespace

CpuKernels kernels() {
  return {CHILDTUNE_STRING(CHILDTUNE_ISA),   Leaving<step>::call,
          Leaving<sum_of_squares>::call,     Leaving<accumulate_squares>::call,
          Leaving<count_upper_halves>::call, Leaving<count_lower_halves>::call,
          Leaving<write_above>::call};
}

}  // namespace CHILDTUNE_ISA
}  // namespace childtune
