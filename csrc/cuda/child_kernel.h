// The compact step of a child network on a GPU, as functions for host and device, as cuda/step_kernel.h has the others.
//
// A warp takes a block of 1024 weights, whose rank is known, in pieces of 128. Of a piece, a lane reads four weights
// and gradients; those of the child network among them it hands over in slots, in order. So the slots are as compact as
// the state, and lane l updates slots l, l + 32, ...: neighbouring lanes read neighbouring state, and nothing is
// computed for weights outside. Then the weights go back to where they came from. A lane finds its slots by counting
// the mask's bits before its own, which all lanes read.
//
// So a piece has phases: load, collect, update, put back; lanes wait for each other in between. A `Warp` runs them.
#pragma once

#include "cuda/step_kernel.h"

namespace childtune {

constexpr int kPiece = 4 * kWarp;
constexpr int kSlotRounds = kPiece / kWarp;  // slots of a lane, at most
static_assert(kChunkTiles * kTile == kThreads / kWarp * kRankBlock, "each warp of a block has a block of the mask");

// Where lanes hand over weights and gradients: memory that a warp shares.
template <class P>
struct Slots {
  P param[kPiece], grad[kPiece];
};

// The mask of a piece.
struct alignas(kMaskAlignment) PieceMask {
  uint64_t half[2];

  // Bits beyond `numel` weights do not count, whatever they are.
  CHILDTUNE_MEMBER PieceMask(const uint8_t* bits, int64_t begin, int64_t numel)
      : PieceMask(*reinterpret_cast<const PieceMask*>(bits + begin / 8)) {
    half[0] &= first_ones(numel - begin);
    half[1] &= first_ones(numel - begin - 64);
  }

  CHILDTUNE_MEMBER static uint64_t first_ones(int64_t n) {
    return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1;
  }

  CHILDTUNE_MEMBER int count() const { return count_ones(half[0]) + count_ones(half[1]); }

  // The bits of the lane's four weights, and how many are set before them.
  CHILDTUNE_MEMBER uint32_t of_lane(int lane, int* before) const {
    const int place = 4 * (lane % 16);
    const uint64_t own = lane < 16 ? half[0] : half[1];
    *before = (lane < 16 ? 0 : count_ones(half[0])) + count_ones(own & first_ones(place));
    return static_cast<uint32_t>(own >> place) & 15;
  }
};

// One piece's phases, each as one lane goes through it.
template <class P, bool kAmsgrad>
struct PieceStep {
  using T = typename ComputeType<P>::type;
  struct Loaded {
    Four<P> param, grad;
    T exp_avg[kSlotRounds], exp_avg_sq[kSlotRounds], max_exp_avg_sq[kSlotRounds];
    uint32_t in_child;  // bit i: the lane's weight i
    int slot;           // of the first of them
  };

  const ChildItem& item;
  const AdamWConstants<T>& constants;
  PieceMask mask;
  int64_t begin, rank;
  int count;  // of slots

  CHILDTUNE_MEMBER QuadSpan quad_span(int lane) const { return quad_at(begin + 4 * lane, item.numel, item.vectors); }

  CHILDTUNE_MEMBER Loaded load(int lane) const {
    Loaded loaded{};
    const QuadSpan span = quad_span(lane);
    load_four<P>(item.data, kParam, span, loaded.param);
    load_four<P>(item.data, kGrad, span, loaded.grad);
    loaded.in_child = mask.of_lane(lane, &loaded.slot);
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kSlotRounds; ++i) {
      const int slot = lane + kWarp * i;
      if (slot >= count) continue;
      loaded.exp_avg[i] = *element<T>(item.data, kExpAvg, rank + slot);
      loaded.exp_avg_sq[i] = *element<T>(item.data, kExpAvgSq, rank + slot);
      if (kAmsgrad) loaded.max_exp_avg_sq[i] = *element<T>(item.data, kMaxExpAvgSq, rank + slot);
    }
    return loaded;
  }

  CHILDTUNE_MEMBER void collect(const Loaded& loaded, Slots<P>& slots) const {
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
      *element<T>(item.data, kExpAvg, rank + slot) = loaded.exp_avg[i];
      *element<T>(item.data, kExpAvgSq, rank + slot) = loaded.exp_avg_sq[i];
      if (kAmsgrad) *element<T>(item.data, kMaxExpAvgSq, rank + slot) = loaded.max_exp_avg_sq[i];
    }
  }

  CHILDTUNE_MEMBER void put_back(int lane, Loaded& loaded, const Slots<P>& slots) const {
    if (loaded.in_child == 0 && !item.decay_outside) return;
    int slot = loaded.slot;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      if ((loaded.in_child >> i & 1) != 0) {
        loaded.param.of[i] = slots.param[slot];
        ++slot;
      } else if (item.decay_outside) {  // what the update does without gradient and state
        const T param = childtune::load(loaded.param.of[i]);
        store(loaded.param.of[i], param * constants.decay_before * constants.decay_after);
      }
    }
    store_four<P>(item.data, kParam, quad_span(lane), loaded.param);
  }
};

// What warp `warp_number` of block `block` does. `slots` is its own.
template <class P, bool kAmsgrad, class Table, class Warp>
CHILDTUNE_INLINE void step_child_warp(const Table& table, uint32_t block, int warp_number, Slots<P>& slots,
                                      const Warp& warp) {
  if (is_skipped(table.header)) return;
  const ChildItem item = table.items[item_of_block(table, block)];
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const int64_t rank_block = int64_t{kThreads / kWarp} * (block - item.first_block) + warp_number;
  if (rank_block >= mask_blocks(item.numel)) return;
  int64_t rank = item.child.ranks[rank_block];
  for (int i = 0; i < kRankBlock / kPiece; ++i) {
    const int64_t begin = rank_block * kRankBlock + i * kPiece;
    if (begin >= item.numel) return;
    const PieceMask mask(item.child.bits, begin, item.numel);
    const int count = mask.count();
    if (rank < 0 || count > item.child.count - rank) return;  // not what was counted when the mask was made
    warp.run(PieceStep<P, kAmsgrad>{item, of_class.constants, mask, begin, rank, count}, slots);
    rank += count;
  }
}

}  // namespace childtune
