// One gradient whose squares are added to Fisher scores.
#pragma once

#include "core/dtypes.h"

namespace childtune {

struct SquaresItem {
  const void* grad;
  float* score;  // contiguous, whatever the layout of the gradient is
  int64_t numel;
  const int64_t* layout;  // nullptr: the gradient is contiguous. Else ndim, shape[ndim], strides[ndim]
  DType dtype;            // of the gradient
};

}  // namespace childtune
