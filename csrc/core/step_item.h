// What a step works on: one plain struct per parameter, the same for every backend.
#pragma once

#include "core/constants.h"
#include "core/dtypes.h"
#include "core/mask.h"
#include "core/packed_mask.h"

namespace childtune {

constexpr int kNormChunk = 1024;  // elements whose squares are summed before those of others: docs/numerics.md

constexpr int kStreams = 5;  // arrays of a step, in this order
enum Stream { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq };
constexpr int kAverages = 3;  // arrays of state, from kExpAvg on

// How the state is stored: in the type that computes; rounded stochastically to bfloat16; or in bytes (core/codes.h).
enum class StateKind : uint8_t { kComputed, kBFloat16, kCodes };

// Where a sharded parameter's elements lie in the whole parameter: equal runs at equal distances.
struct MaskSlice {
  uint64_t offset = 0;  // flat index of the first element
  int64_t run = 0;      // consecutive elements in a run; 0: all of them
  uint64_t stride = 0;  // distance between the beginnings of neighbouring runs
};

struct StepItem {
  void* data[kStreams];   // kMaxExpAvgSq: nullptr without amsgrad
  int64_t numel;          // of param and grad, and of the state unless it is compact
  const int64_t* layout;  // nullptr: every array is contiguous. Else ndim, shape[ndim], strides[ndim] per stream
  DType dtype;            // of param and grad; the state is float, or double for double
  bool masked;
  uint32_t keep_threshold;
  MaskKey key;
  MaskSlice slice;     // where anything is rounded stochastically: one run, which begins at a mask block
  PackedMask child;    // with a child network, the state is contiguous, of child.count values; `masked` is false
  bool decay_outside;  // weights outside the child network decay too
  StateKind state;
  bool stochastic;             // the parameter is rounded stochastically
  uint8_t* scales[kAverages];  // of kCodes: a byte for each mask block of the parameter; the codes are contiguous
  AdamWConstants<double> constants;
  double* counter;  // where a GPU counts the steps: its count, on the device; key.step and constants are not set then
  uint32_t group;   // where a GPU counts the steps: the number of the parameter's group in this step
};

// Returns the bytes of an element of one of the item's arrays.
CHILDTUNE_INLINE int64_t element_size(const StepItem& item, int stream) {
  if (stream > kGrad && item.state == StateKind::kCodes) return 1;
  if (stream > kGrad && item.state == StateKind::kBFloat16) return 2;
  if (stream <= kGrad && (item.dtype == DType::kBFloat16 || item.dtype == DType::kFloat16)) return 2;
  return item.dtype == DType::kFloat64 ? 8 : 4;
}

// Returns whether a step rounds anything of the item stochastically. Parameters of 32 bits or more are stored as they
// are computed.
CHILDTUNE_INLINE bool is_rounded(const StepItem& item) {
  return item.state != StateKind::kComputed || (item.stochastic && element_size(item, kParam) == 2);
}

}  // namespace childtune
