// The table of the CPU's kernels: the functions that each instruction set provides.
#pragma once

#include "core/squares_item.h"
#include "core/step_item.h"

namespace childtune {

struct CpuKernels {
  const char* name;  // of the instruction set
  // Takes one step with the elements [begin, end) of the item, by logical index.
  void (*step)(const StepItem& item, int64_t begin, int64_t end);
  // Returns the sum of squares of the gradient's elements [begin, end): at most kNormChunk of them, and begin is a
  // multiple of it.
  double (*sum_of_squares)(const StepItem& item, int64_t begin, int64_t end);
  // Adds weight * (gradient * grad_factor)^2 to the scores of the elements [begin, end). Returns whether their
  // gradients were finite.
  bool (*accumulate_squares)(const SquaresItem& item, double weight, double grad_factor, int64_t begin, int64_t end);
  // The next three look at the keys of `count` scores, to select some; cpu/select.cpp says how they work together.
  // Adds to `counts` how many keys have each upper half. Returns whether there is a NaN.
  bool (*count_upper_halves)(const float* scores, int64_t count, uint32_t flip, int64_t* counts);
  // Of the keys whose upper half is `upper`, adds to `counts` how many have each lower half.
  void (*count_lower_halves)(const float* scores, int64_t count, uint32_t flip, uint32_t upper, int64_t* counts);
  // Writes mask_bytes(count) of bits, set where the key is above the threshold. Returns how many keys equal it.
  int64_t (*write_above)(const float* scores, int64_t count, uint32_t flip, uint32_t threshold, uint8_t* bits);
};

namespace baseline {
CpuKernels kernels();
}
namespace avx2 {
CpuKernels kernels();
}
namespace avx512 {
CpuKernels kernels();
}

}  // namespace childtune
