// Fills tables in order, and begins the next where one is full.
#include "cuda/score_plan.h"

#include <stdexcept>

namespace childtune {
namespace {

constexpr int64_t kMostChunks = 0x7FFFFFFF;  // of a launch: CUDA's limit

}  // namespace

std::vector<ScoreTable> score_tables(const std::vector<ScoredTensor>& tensors, int32_t* ties) {
  std::vector<ScoreTable> tables;
  int64_t before = 0, chunks = 0;  // chunks of the tables before the last one, and of the last one
  for (const ScoredTensor& tensor : tensors) {
    if (tensor.numel == 0) continue;
    if (tables.empty() || tables.back().count == ScoreTable::kItems || chunks + chunks_of(tensor.numel) > kMostChunks) {
      before += chunks;
      chunks = 0;
      tables.push_back({});
      if (ties != nullptr) tables.back().ties = ties + kChunkPackedBlocks * before;
    }
    ScoreTable& table = tables.back();
    table.items[table.count++] = {tensor.scores, reinterpret_cast<uint32_t*>(tensor.bits), tensor.numel, chunks};
    chunks += chunks_of(tensor.numel);
    if (chunks > kMostChunks) throw std::length_error("a tensor of scores is too large for a GPU");
  }
  return tables;
}

int64_t tie_counts(const std::vector<ScoredTensor>& tensors) {
  int64_t chunks = 0;
  for (const ScoredTensor& tensor : tensors) chunks += chunks_of(tensor.numel);
  return kChunkPackedBlocks * chunks;
}

unsigned score_blocks(const ScoreTable& table) {
  const ScoreItem& last = table.items[table.count - 1];
  return static_cast<unsigned>(last.first_chunk + chunks_of(last.numel));
}

unsigned squares_blocks(const SquaresArgument& argument) {
  return static_cast<unsigned>((argument.numel + kSquaresChunk - 1) / kSquaresChunk);
}

}  // namespace childtune
