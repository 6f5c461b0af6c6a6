// The sum of the squares of all gradients on a GPU, in the order of the CPU's (docs/numerics.md), so with its bits:
// three kernels, for the chunks of kNormChunk elements, for the tensors, and for the total. Written as functions for
// host and device: the CPU can run them in loops over blocks, warps and lanes.
#pragma once

#include "core/dtypes.h"
#include "core/packed_mask.h"
#include "core/step_item.h"
#include "cuda/launch.h"

namespace childtune {

constexpr int kBlockChunks = 32;  // chunks that a block of threads takes

struct NormItem {
  const void* grad;     // contiguous
  const uint8_t* bits;  // of the elements that count, as in PackedMask; nullptr: all
  int64_t numel;        // not 0
  int64_t first_chunk;
  DType dtype;
};

// The argument of the kernels `norm_chunks` and `norm_tensors`, by value.
struct NormTable {
  static constexpr int kItems = (kSmallArguments - 32) / int{sizeof(NormItem)};

  double* chunk_sums;   // on the device, of this table's chunks
  double* tensor_sums;  // on the device, of this table's tensors
  int64_t count, chunks;
  NormItem items[kItems];
};
static_assert(sizeof(NormTable) <= kSmallArguments, "an argument's limit");

// The argument of the kernel `norm_total`, by value.
struct NormTotal {
  const double* tensor_sums;  // on the device, of all tables' tensors
  int64_t count;
  double* total;  // on the device
};

CHILDTUNE_INLINE int64_t norm_chunks_of(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

constexpr int kNormAhead = 16;  // values that a lane loads before it adds the first
constexpr int kNormTurns = kNormChunk / kWarp / kNormAhead;

// Loads a lane's values of turn `turn`: elements kWarp * kNormTurns apart, from `first` on. What does not count is 0.
template <class P>
CHILDTUNE_INLINE void load_turn(const NormItem& item, int64_t first, P (&values)[kNormAhead]) {
  const P* grad = static_cast<const P*>(item.grad);
  constexpr int kApart = kWarp * kNormTurns;
  if (item.bits == nullptr && first / kNormChunk < item.numel / kNormChunk) {
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kNormAhead; ++i) values[i] = grad[first + kApart * i];
  } else {
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kNormAhead; ++i) {
      const int64_t at = first + kApart * i;
      values[i] = at < item.numel && (item.bits == nullptr || in_child(item.bits, at)) ? grad[at] : P{};
    }
  }
}

// Adds up by halving; the sum comes first.
template <int kHalf>
CHILDTUNE_INLINE void add_halves(double (&values)[kNormAhead]) {
  CHILDTUNE_UNROLLED
  for (int i = 0; i < kHalf; ++i) values[i] += values[i + kHalf];
  if constexpr (kHalf > 1) add_halves<kHalf / 2>(values);
}

// Returns what lane `lane` adds up of a chunk: the squares of 32 elements, 32 apart, by halving. The first half and the
// second meet last, so they are added up one after the other. The lanes' sums, added up by halving too, are the chunk's
// sum.
template <class P>
CHILDTUNE_INLINE double lane_squares_of(const NormItem& item, int64_t chunk, int lane) {
  double sums[kNormTurns];
  CHILDTUNE_UNROLLED
  for (int turn = 0; turn < kNormTurns; ++turn) {
    P values[kNormAhead];
    load_turn<P>(item, chunk * kNormChunk + kWarp * turn + lane, values);
    double squares[kNormAhead];
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kNormAhead; ++i) {
      const double value = load(values[i]);
      squares[i] = value * value;
    }
    add_halves<kNormAhead / 2>(squares);
    sums[turn] = squares[0];
  }
  static_assert(kNormTurns == 2, "two sums meet");
  return sums[0] + sums[1];
}

CHILDTUNE_INLINE double lane_squares(const NormItem& item, int64_t chunk, int lane) {
  switch (item.dtype) {
    case DType::kFloat32:
      return lane_squares_of<float>(item, chunk, lane);
    case DType::kFloat64:
      return lane_squares_of<double>(item, chunk, lane);
    case DType::kBFloat16:
      return lane_squares_of<BFloat16>(item, chunk, lane);
    case DType::kFloat16:
      return lane_squares_of<Float16>(item, chunk, lane);
  }
  return 0.0;
}

// What warp `warp_number` of the block of threads `block` does in `norm_chunks`. `Warp` adds up what its lanes have, by
// halving.
template <class Warp>
CHILDTUNE_INLINE void sum_chunks(const NormTable& table, uint32_t block, int warp_number, const Warp& warp) {
  int64_t chunk = int64_t{kBlockChunks} * block + warp_number;
  const int64_t end = int64_t{kBlockChunks} * (block + int64_t{1});
  for (; chunk < end && chunk < table.chunks; chunk += kThreads / kWarp) {
    const NormItem& item = table.items[item_of_chunk(table, chunk)];
    const auto of_lane = [&](int lane) { return lane_squares(item, chunk - item.first_chunk, lane); };
    warp.sum(of_lane, table.chunk_sums + chunk);
  }
}

// What the block of threads `number` does in `norm_tensors`. `Block` calls a function with 0 .. n-1, in any order, and
// waits for all calls.
template <class Block>
CHILDTUNE_INLINE void sum_tensor(const NormTable& table, uint32_t number, const Block& block) {
  const NormItem& item = table.items[number];
  double* sums = table.chunk_sums + item.first_chunk;
  int64_t count = norm_chunks_of(item.numel), half = 1;
  while (half < count) half *= 2;
  for (half /= 2; half >= 1; half /= 2) {
    block.each(count - half, [&](int64_t i) { sums[i] += sums[i + half]; });
    count = count < half ? count : half;
  }
  block.each(1, [&](int64_t) { table.tensor_sums[number] = sums[0]; });
}

// What the only thread does in `norm_total`.
CHILDTUNE_INLINE void sum_total(const NormTotal& norm) {
  double total = 0.0;
  for (int64_t i = 0; i < norm.count; ++i) total += norm.tensor_sums[i];
  *norm.total = total;
}

}  // namespace childtune
