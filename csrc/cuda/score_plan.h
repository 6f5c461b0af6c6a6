// The arguments of the kernels that select scores, tables of few tensors, and what those and the kernel of squares are
// launched with. Plain C++, as cuda/launch_plan.h.
#pragma once

#include <vector>

#include "cpu/selection.h"
#include "cuda/fisher_kernel.h"
#include "cuda/selection_kernel.h"

namespace childtune {

// Tables of tensors that lie on one device, in their order. `ties` has tie_counts(tensors) entries, or is nullptr.
std::vector<ScoreTable> score_tables(const std::vector<ScoredTensor>& tensors, int32_t* ties);

int64_t tie_counts(const std::vector<ScoredTensor>& tensors);

// Blocks of threads.
unsigned score_blocks(const ScoreTable& table);
unsigned squares_blocks(const SquaresArgument& argument);

}  // namespace childtune
