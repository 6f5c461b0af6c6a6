// The compact step of a child network on a GPU, as functions for host and device: the CPU can run them in loops over
// blocks, warps and lanes.
//
// A warp takes a packed block of 1024 weights. Its slots are the child network's weights among them, in order, and so
// are as compact as the state, whose offset is known. Each lane lists where the weights of its 32 bits of the mask are,
// in memory that the warp shares; where its part of the list begins, the lanes find by adding up how many bits those
// before have. Then lane l updates slots l, l + 32, ...: neighbouring lanes read neighbouring state, and weights and
// gradients that are mostly in the same lines of memory. Nothing is read or computed for weights outside, unless they
// decay: that comes before.
//
// So a packed block has the phases list, decay and update; lanes wait for each other in between. A `Warp` runs them:
// GpuWarp (cuda/warp.h) does on a GPU.
#pragma once

#include "core/adamw.h"
#include "core/dtypes.h"
#include "cuda/quad.h"
#include "cuda/step_table.h"

namespace childtune {

constexpr int kSlotRounds = 2;  // slots that a lane reads before it updates the first of them
static_assert(kChunkTiles * kTile == kThreads / kWarp * kPackedBlock, "each warp of a chunk has a packed block");
static_assert(kPackedBlock == 32 * kWarp, "each lane has a word of the mask");

// Where the slots' weights are in their packed block: memory that a warp shares.
struct SlotPlaces {
  uint16_t of[kPackedBlock];
};

// A packed block, whose slots are listed, and whose weights outside decay. Item: ChildItem or RoundedItem.
template <class P, class Item>
struct SlotLister {
  using T = typename ComputeType<P>::type;

  const Item& item;
  const AdamWConstants<T>& constants;
  int64_t begin;   // of the packed block, in the parameter
  int64_t offset;  // of its first slot, in the compact state

  // Returns the lane's bits of the mask, without those beyond the parameter: a mask that was changed may have some.
  CHILDTUNE_MEMBER uint32_t word(int lane) const {
    const int64_t left = item.numel - begin - 32 * lane;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(item.child.bits + begin / 8 + 4 * lane);
    return left >= 32 ? word : left <= 0 ? 0 : word & ((1u << left) - 1);
  }

  // Bits and offsets may have been changed since they were counted: nothing is done where they leave the state's
  // arrays.
  CHILDTUNE_MEMBER bool fits(int slots) const { return offset >= 0 && slots <= item.child.count - offset; }

  // Lists the places of the bits of `word`, the lane's; `before` are set in the words before it.
  CHILDTUNE_MEMBER void list(int lane, uint32_t word, int before, SlotPlaces& places) const {
    for (int slot = before + count_ones(word); word != 0;) {
      const int bit = highest_one(word);
      places.of[--slot] = static_cast<uint16_t>(32 * lane + bit);
      word ^= 1u << bit;
    }
  }

  // Decays the weights outside, four at a time; the updates come after, and overwrite what this writes of the others.
  CHILDTUNE_MEMBER void decay(int lane) const {
    void* const param = item.data[kParam];  // a copy: else the compiler makes no vector stores
    for (int64_t at = begin + 4 * lane; at < begin + kPackedBlock; at += 4 * kWarp) {
      const QuadSpan span = quad_at(at, item.numel, (item.vectors >> kParam & 1) != 0);
      Four<P> four{};
      load_four(param, span, four);
      const uint32_t in_child = item.child.bits[at / 8] >> (at % 8);
      CHILDTUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        if ((in_child >> i & 1) != 0) continue;
        store(four.of[i], decayed_outside(constants, T(childtune::load(four.of[i]))));
      }
      store_four(param, span, four);
    }
  }
};

// The phases of one packed block, each as one lane goes through it.
template <class P, bool kAmsgrad>
struct ChildStep : SlotLister<P, ChildItem> {
  using typename SlotLister<P, ChildItem>::T;
  using SlotLister<P, ChildItem>::item;
  using SlotLister<P, ChildItem>::constants;
  using SlotLister<P, ChildItem>::begin;
  using SlotLister<P, ChildItem>::offset;
  struct Slot {
    P* param;
    P weight, grad;
    T exp_avg, exp_avg_sq, max_exp_avg_sq;
  };

  CHILDTUNE_MEMBER T& state(Stream stream, int slot) const {
    return *(static_cast<T*>(item.data[stream]) + (offset + slot));
  }

  CHILDTUNE_MEMBER void update_slot(int slot, Slot& of) const {
    T param = childtune::load(of.weight);
    adamw_update<kAmsgrad>(constants, true, T(childtune::load(of.grad)), param, of.exp_avg, of.exp_avg_sq,
                           of.max_exp_avg_sq);
    store(*of.param, param);
    state(kExpAvg, slot) = of.exp_avg;
    state(kExpAvgSq, slot) = of.exp_avg_sq;
    if (kAmsgrad) state(kMaxExpAvgSq, slot) = of.max_exp_avg_sq;
  }

  // Updates the lane's slots, of `slots` in all.
  CHILDTUNE_MEMBER void update(int lane, int slots, const SlotPlaces& places) const {
    P* const param = static_cast<P*>(item.data[kParam]) + begin;
    const P* const grad = static_cast<const P*>(item.data[kGrad]) + begin;
    for (int first = lane; first < slots; first += kWarp * kSlotRounds) {
      Slot round[kSlotRounds];
      CHILDTUNE_UNROLLED
      for (int i = 0; i < kSlotRounds; ++i) {
        const int slot = first + kWarp * i;
        if (slot >= slots) continue;
        const int place = places.of[slot];
        round[i].param = param + place;
        round[i].weight = param[place];
        round[i].grad = grad[place];
        round[i].exp_avg = state(kExpAvg, slot);
        round[i].exp_avg_sq = state(kExpAvgSq, slot);
        if (kAmsgrad) round[i].max_exp_avg_sq = state(kMaxExpAvgSq, slot);
      }
      CHILDTUNE_UNROLLED
      for (int i = 0; i < kSlotRounds; ++i) {
        const int slot = first + kWarp * i;
        if (slot < slots) update_slot(slot, round[i]);
      }
    }
  }
};

// What warp `warp_number` of the block of threads `block` does. `places` belongs to this warp alone.
template <class P, bool kAmsgrad, class Table, class Warp>
CHILDTUNE_INLINE void step_child_warp(const Table& table, uint32_t block, int warp_number, SlotPlaces& places,
                                      const Warp& warp) {
  if (is_skipped(table.header)) return;
  const ChildItem item = table.items[item_of_block(table, block)];
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const int64_t packed_block = int64_t{kThreads / kWarp} * (block - item.first_block) + warp_number;
  if (packed_block >= packed_blocks(item.numel)) return;
  const int64_t offset = item.child.offsets[packed_block];
  warp.run(ChildStep<P, kAmsgrad>{{item, of_class.constants, packed_block * kPackedBlock, offset}}, places);
}

}  // namespace childtune
