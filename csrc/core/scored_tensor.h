// One tensor in a selection: its scores, and where the mask of the selected weights is written.
#pragma once

#include "core/compiler.h"

namespace childtune {

struct ScoredTensor {
  const float* scores;
  uint8_t* bits;  // mask_bytes(numel) bytes, in the layout of core/packed_mask.h
  int64_t numel;
};

}  // namespace childtune
