// What the CPU offers for a step: the functions that each instruction set provides.
#pragma once

#include "core/step_item.h"

namespace childtune {

struct CpuKernels {
  const char* name;
  // One step over the elements [begin, end) of the item, by logical index.
  void (*step)(const StepItem& item, int64_t begin, int64_t end);
  // The sum of squares of the gradient's elements [begin, end), at most kNormChunk of them, begin a multiple of it.
  double (*sum_of_squares)(const StepItem& item, int64_t begin, int64_t end);
  // Adds weight * (gradient * grad_factor)^2 to the scores, floats in data[kExpAvgSq] that are contiguous whatever the
  // layout says, for the elements [begin, end). Returns whether these gradients were finite.
  bool (*accumulate_squares)(const StepItem& item, double weight, double grad_factor, int64_t begin, int64_t end);
  // Selection among `count` scores, by their keys: see cpu/selection.cpp. Adds to the counts of the keys' upper halves,
  // and returns whether there is a NaN; adds to the counts of the lower halves of the keys whose upper one is `upper`.
  bool (*count_upper_halves)(const float* scores, int64_t count, uint32_t flip, int64_t* counts);
  void (*count_lower_halves)(const float* scores, int64_t count, uint32_t flip, uint32_t upper, int64_t* counts);
  // Writes mask_bytes(count) of bits, set where the key is above the threshold; returns how many keys equal it.
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
