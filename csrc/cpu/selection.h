// The k highest (or lowest) of all scores in a list of tensors, as packed masks: an exact selection without a sort and
// without a copy of the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "core/packed_mask.h"

namespace childtune {

// The scores of one parameter, and where its mask is written: mask_bytes(numel).
struct ScoredTensor {
  const float* scores;
  uint8_t* bits;
  int64_t numel;
};

// Sets the bits of exactly the `k` highest scores, or lowest, and clears all others; `k` is at most the number of
// scores. Of equal scores (0.0 and -0.0 are) the one with the lower index is taken: earlier tensor, then flat index.
// Returns -1; if there is a NaN, the number of the first tensor that has one, and then has written nothing. The result
// does not depend on `threads`.
int64_t select_cpu(const std::vector<ScoredTensor>& tensors, int64_t k, bool largest, int threads);

}  // namespace childtune
