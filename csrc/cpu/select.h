// The k highest (or lowest) of all scores in a list of tensors, as packed masks: an exact selection without a sort and
// without a copy of the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "core/scored_tensor.h"

namespace childtune {

// Sets the bits of exactly the `k` highest scores, or lowest, and clears all others; `k` is at most the number of
// scores. Of equal scores (0.0 and -0.0 are) the one with the lower index is taken: earlier tensor, then flat index.
// Returns -1. If a score is NaN, writes nothing and returns the number of the first tensor with a NaN. The result does
// not depend on `threads`.
int64_t select_cpu(const std::vector<ScoredTensor>& tensors, int64_t k, bool largest, int threads);

}  // namespace childtune
