// The compact step of a child network on a GPU, as functions for host and device: the CPU can run them in loops over
// blocks, warps and lanes.
//
// A warp takes a packed block of 1024 weights, whose offset is known, in pieces of 128. Of a piece, a lane reads four
// weights and gradients, and writes those of the child network to slots, in order. So the slots are as compact as the
// state, and lane l updates slots l, l + 32, ...: neighbouring lanes read neighbouring state, and nothing is computed
// for weights outside. Then each lane reads its weights from their slots. A lane finds its slots by counting the mask's
// bits before its own, which all lanes read.
//
// So a piece has the phases load, compress, update and expand; lanes wait for each other in between. A `Warp` runs
// them: GpuWarp (cuda/warp.h) does on a GPU.
#pragma once

#include "core/adamw.h"
#include "core/dtypes.h"
#include "cuda/quad.h"
#include "cuda/step_table.h"

namespace childtune {

constexpr int kPiece = 4 * kWarp;
constexpr int kSlotRounds = kPiece / kWarp;  // slots of a lane, at most
static_assert(kChunkTiles * kTile == kThreads / kWarp * kPackedBlock, "each warp of a chunk has a packed block");

// The weights and gradients of a piece, compressed: memory that a warp shares.
template <class P>
struct Slots {
  P param[kPiece], grad[kPiece];
};

// The mask of a piece.
struct alignas(kMaskAlignment) PieceMask {
  uint64_t half[2];

  // Clears bits beyond `numel` weights: a mask that was changed may have some set.
  CHILDTUNE_MEMBER PieceMask(const uint8_t* bits, int64_t begin, int64_t numel)
      : PieceMask(*reinterpret_cast<const PieceMask*>(bits + begin / 8)) {
    half[0] &= first_ones(numel - begin);
    half[1] &= first_ones(numel - begin - 64);
  }

  CHILDTUNE_MEMBER static uint64_t first_ones(int64_t n) {
    return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1;
  }

  CHILDTUNE_MEMBER int count() const { return count_ones(half[0]) + count_ones(half[1]); }

  // Returns the bits of the lane's four weights; sets *before to how many are set before them.
  CHILDTUNE_MEMBER uint32_t of_lane(int lane, int* before) const {
    const int place = 4 * (lane % 16);
    const uint64_t own = lane < 16 ? half[0] : half[1];
    *before = (lane < 16 ? 0 : count_ones(half[0])) + count_ones(own & first_ones(place));
    return static_cast<uint32_t>(own >> place) & 15;
  }
};

// The phases of one piece, each as one lane goes through it.
template <class P, bool kAmsgrad>
struct PieceStep {
  using T = typename ComputeType<P>::type;
  struct Loaded {
    Four<P> param, grad;
    T exp_avg[kSlotRounds], exp_avg_sq[kSlotRounds], max_exp_avg_sq[kSlotRounds];
    uint32_t in_child;  // bit i: the lane's weight i
    int slot;           // of the first of those weights
  };

  const ChildItem& item;
  const AdamWConstants<T>& constants;
  PieceMask mask;
  int64_t begin;   // of the piece, in the parameter
  int64_t offset;  // of its first slot, in the compact state
  int count;       // of slots

  CHILDTUNE_MEMBER QuadSpan quad_span(int lane) const { return quad_at(begin + 4 * lane, item.numel, item.vectors); }

  CHILDTUNE_MEMBER T& state(Stream stream, int slot) const {
    return *(static_cast<T*>(item.data[stream]) + (offset + slot));
  }

  CHILDTUNE_MEMBER Loaded load(int lane) const {
    Loaded loaded{};
    const QuadSpan span = quad_span(lane);
    load_four(item.data[kParam], span, loaded.param);
    load_four(item.data[kGrad], span, loaded.grad);
    loaded.in_child = mask.of_lane(lane, &loaded.slot);
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kSlotRounds; ++i) {
      const int slot = lane + kWarp * i;
      if (slot >= count) continue;
      loaded.exp_avg[i] = state(kExpAvg, slot);
      loaded.exp_avg_sq[i] = state(kExpAvgSq, slot);
      if (kAmsgrad) loaded.max_exp_avg_sq[i] = state(kMaxExpAvgSq, slot);
    }
    return loaded;
  }

  CHILDTUNE_MEMBER void compress(const Loaded& loaded, Slots<P>& slots) const {
    int slot = loaded.slot;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      if ((loaded.in_child >> i & 1) == 0) continue;
      slots.param[slot] = loaded.param.of[i];
      slots.grad[slot] = loaded.grad.of[i];
      ++slot;
    }
  }

  CHILDTUNE_MEMBER void update(int lane, Loaded& loaded, Slots<P>& slots) const {
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kSlotRounds; ++i) {
      const int slot = lane + kWarp * i;
      if (slot >= count) continue;
      T param = childtune::load(slots.param[slot]);
      adamw_update<kAmsgrad>(constants, true, T(childtune::load(slots.grad[slot])), param, loaded.exp_avg[i],
                             loaded.exp_avg_sq[i], loaded.max_exp_avg_sq[i]);
      store(slots.param[slot], param);
      state(kExpAvg, slot) = loaded.exp_avg[i];
      state(kExpAvgSq, slot) = loaded.exp_avg_sq[i];
      if (kAmsgrad) state(kMaxExpAvgSq, slot) = loaded.max_exp_avg_sq[i];
    }
  }

  CHILDTUNE_MEMBER void expand(int lane, Loaded& loaded, const Slots<P>& slots) const {
    if (loaded.in_child == 0 && !item.decay_outside) return;
    int slot = loaded.slot;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      if ((loaded.in_child >> i & 1) != 0) {
        loaded.param.of[i] = slots.param[slot];
        ++slot;
      } else if (item.decay_outside) {
        store(loaded.param.of[i], decayed_outside(constants, T(childtune::load(loaded.param.of[i]))));
      }
    }
    store_four(item.data[kParam], quad_span(lane), loaded.param);
  }
};

// What warp `warp_number` of the block of threads `block` does. `slots` belongs to this warp alone.
template <class P, bool kAmsgrad, class Table, class Warp>
CHILDTUNE_INLINE void step_child_warp(const Table& table, uint32_t block, int warp_number, Slots<P>& slots,
                                      const Warp& warp) {
  if (is_skipped(table.header)) return;
  const ChildItem item = table.items[item_of_block(table, block)];
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const int64_t packed_block = int64_t{kThreads / kWarp} * (block - item.first_block) + warp_number;
  if (packed_block >= packed_blocks(item.numel)) return;
  int64_t offset = item.child.offsets[packed_block];
  for (int i = 0; i < kPackedBlock / kPiece; ++i) {
    const int64_t begin = packed_block * kPackedBlock + i * kPiece;
    if (begin >= item.numel) return;
    const PieceMask mask(item.child.bits, begin, item.numel);
    const int count = mask.count();
    // Bits and offsets may have been changed since they were counted: stop where they leave the state's arrays.
    if (offset < 0 || count > item.child.count - offset) return;
    warp.run(PieceStep<P, kAmsgrad>{item, of_class.constants, mask, begin, offset, count}, slots);
    offset += count;
  }
}

}  // namespace childtune
