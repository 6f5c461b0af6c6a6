// The arguments of the kernels that select scores, tables of few tensors, and how many blocks of threads they and the
// kernel of squares are launched with. Plain C++, without CUDA.
#pragma once

#include <vector>

#include "core/scored_tensor.h"
#include "cuda/select_kernel.h"
#include "cuda/squares_kernel.h"

namespace childtune {

// Tables of tensors that lie on one device, in their order. `ties` has tie_counts(tensors) entries, or is nullptr.
std::vector<ScoreTable> score_tables(const std::vector<ScoredTensor>& tensors, int32_t* ties);

// How many packed blocks' ties are counted: those of whole chunks.
int64_t tie_counts(const std::vector<ScoredTensor>& tensors);

// Blocks of threads.
unsigned score_blocks(const ScoreTable& table);
unsigned squares_blocks(const SquaresArgument& argument);

}  // namespace childtune
