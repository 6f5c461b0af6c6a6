// What a CPU step works on: one plain struct per parameter, and the functions that each instruction set provides.
#pragma once

#include <cstdint>

#include "core/constants.h"
#include "core/mask.h"
#include "core/packed_mask.h"

namespace childtune {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int kStreams = 5;  // arrays of a step, in this order
enum Stream { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq };

// Where a sharded parameter's elements lie in the whole parameter: equal runs at equal distances.
struct MaskSlice {
  uint64_t offset = 0;  // flat index of the first element
  int64_t run = 0;      // consecutive elements in a run; 0: all of them
  uint64_t stride = 0;  // distance between the beginnings of neighbouring runs
};

struct StepItem {
  void* data[kStreams];   // kMaxExpAvgSq: nullptr without amsgrad
  int64_t numel;          // elements here; all arrays have the same shape, but for the state of a child network
  const int64_t* layout;  // nullptr: every array is contiguous. Else ndim, shape[ndim], strides[ndim] per stream
  DType dtype;            // of param and grad; the state is float, or double for double
  bool masked;
  uint32_t keep_threshold;
  MaskKey key;
  MaskSlice slice;
  PackedMask child;    // with it, the state is contiguous, of child.count values, and `masked` is false
  bool decay_outside;  // weights outside the child network decay too
  AdamWConstants<double> constants;
};

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

constexpr int kNormChunk = 1024;

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
