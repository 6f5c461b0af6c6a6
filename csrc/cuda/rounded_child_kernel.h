// The compact step of a child network on a GPU where its state is stored in fewer bits, or its weights are rounded
// stochastically, as functions for host and device: the CPU can run them in loops over blocks, warps and lanes.
//
// Packed blocks, slots and their places are those of cuda/child_kernel.h. A packed block has eight mask blocks, which
// the warp takes one after the other, because a mask block's values share their scales and their words for rounding.
// Its slots follow each other: a lane takes every 32nd of them, at most four, in rounds of two.
//
// So a packed block has the phases list and decay, and each of its mask blocks load and update in two rounds, most and
// store, with an exchange before store. A `Warp` runs them: GpuWarp (cuda/warp.h) does on a GPU.
#pragma once

#include "cuda/child_kernel.h"
#include "cuda/rounded_state.h"

namespace childtune {

constexpr int kMaskBlocks = static_cast<int>(kPackedBlock) / kMaskBlock;  // of a packed block
constexpr int kMaskLanes = kMaskBlock / 32;                               // lanes whose words are a mask block's
static_assert(kMaskBlock == 4 * kWarp, "a lane has at most four slots of a mask block");

// The slots of a mask block: [first, end) of its packed block's.
struct SlotSpan {
  int number;  // of the mask block, in the packed block
  int first, end;
};

// The averages of a lane's slots of a round, as they are stored, in the low bits.
struct SlotState {
  uint32_t bits[kAverages][kSlotRounds];

  template <class V>
  CHILDTUNE_MEMBER void get(int average, int i, V& to) const {
    memcpy(&to, &bits[average][i], sizeof(to));
  }
};

// The phases of one packed block and of its mask blocks, each as one lane goes through it.
template <class P>
struct RoundedChildStep : SlotLister<P, RoundedItem> {
  using SlotLister<P, RoundedItem>::item;
  using SlotLister<P, RoundedItem>::constants;
  using SlotLister<P, RoundedItem>::begin;
  using SlotLister<P, RoundedItem>::offset;
  struct Loaded {
    int place[kSlotRounds];  // in the packed block
    P param[kSlotRounds], grad[kSlotRounds];
    SlotState state;
    PerAverage scales;
  };

  MaskKey key;

  CHILDTUNE_MEMBER int64_t block_of(int number) const { return begin / kMaskBlock + number; }
  CHILDTUNE_MEMBER bool has_codes() const { return item.state == StateKind::kCodes; }
  CHILDTUNE_MEMBER int averages() const { return averages_of(item); }

  // Draws the words of mask block lane % 8 of the packed block.
  CHILDTUNE_MEMBER RoundingWords draw_words(int lane) const {
    return rounding_words(key, item.first_mask_block + static_cast<uint64_t>(block_of(lane % kMaskBlocks)));
  }

  // Returns the number of slot `i` of a lane; there is none from slots.end on.
  static CHILDTUNE_MEMBER int slot_of(int lane, const SlotSpan& slots, int i) { return slots.first + lane + kWarp * i; }

  CHILDTUNE_MEMBER Loaded load(int lane, const SlotSpan& slots, int round, const SlotPlaces& places) const {
    Loaded loaded{};
    loaded.scales = load_scales(item, block_of(slots.number));
    visit_state(item.state, SlotLoader{*this, lane, slots, round, places, loaded});
    return loaded;
  }

  struct SlotLoader {
    const RoundedChildStep& step;
    int lane;
    const SlotSpan& slots;
    int round;
    const SlotPlaces& places;
    Loaded& loaded;

    template <class V>
    CHILDTUNE_MEMBER void visit(V value) const {
      const P* const param = static_cast<const P*>(step.item.data[kParam]) + step.begin;
      const P* const grad = static_cast<const P*>(step.item.data[kGrad]) + step.begin;
      CHILDTUNE_UNROLLED
      for (int i = 0; i < kSlotRounds; ++i) {
        const int slot = slot_of(lane, slots, kSlotRounds * round + i);
        if (slot >= slots.end) continue;
        loaded.place[i] = places.of[slot];
        loaded.param[i] = param[loaded.place[i]];
        loaded.grad[i] = grad[loaded.place[i]];
        CHILDTUNE_UNROLLED
        for (int a = 0; a < kAverages; ++a) {
          if (a >= step.averages()) continue;
          value = step.state(value, a, slot);
          memcpy(&loaded.state.bits[a][i], &value, sizeof(value));
        }
      }
    }
  };

  template <class V>
  CHILDTUNE_MEMBER V& state(V, int average, int slot) const {
    return *(static_cast<V*>(item.data[kExpAvg + average]) + (offset + slot));
  }

  static CHILDTUNE_MEMBER uint32_t random_of(uint32_t word, int place) {
    return rounding_bits(word, static_cast<uint32_t>(place % kMaskBlock));
  }

  // Sets the quad's averages of the round's slots to what they become, and stores the weights.
  CHILDTUNE_MEMBER void update(int lane, const SlotSpan& slots, int round, const RoundingWords& words,
                               const Loaded& loaded, Quad<float>& quad) const {
    P* const param = static_cast<P*>(item.data[kParam]) + begin;
    decode_state<kSlotRounds>(item, loaded.state, loaded.scales, kSlotRounds * round, quad);
    CHILDTUNE_UNROLLED
    for (int i = 0; i < kSlotRounds; ++i) {
      const int at = kSlotRounds * round + i;
      if (slot_of(lane, slots, at) >= slots.end) continue;
      float weight = childtune::load(loaded.param[i]);
      adamw_update<true>(constants, true, childtune::load(loaded.grad[i]), weight, quad.exp_avg.of[at],
                         quad.exp_avg_sq.of[at], quad.max_exp_avg_sq.of[at]);
      store_weight(item, weight, random_of(words.param, loaded.place[i]), param[loaded.place[i]]);
    }
  }

  // With codes: returns the largest magnitudes of the lane's slots.
  CHILDTUNE_MEMBER PerAverage most(int lane, const SlotSpan& slots, Quad<float>& quad) const {
    uint32_t exist = 0;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) exist |= (slot_of(lane, slots, i) < slots.end ? 1u : 0u) << i;
    return sanitize_state(exist, quad);
  }

  // `most` has those of the mask block.
  CHILDTUNE_MEMBER void store(int lane, const SlotSpan& slots, const SlotPlaces& places, const PerAverage& most,
                              const RoundingWords& words, Quad<float>& quad) const {
    const PerAverage scales = scales_for(most);
    visit_state(item.state, SlotStorer{*this, lane, slots, places, scales, words, quad});
    if (has_codes() && lane == 0) store_scales(item, block_of(slots.number), scales);
  }

  struct SlotStorer {
    const RoundedChildStep& step;
    int lane;
    const SlotSpan& slots;
    const SlotPlaces& places;
    const PerAverage& scales;
    const RoundingWords& words;
    Quad<float>& quad;

    template <class V>
    CHILDTUNE_MEMBER void visit(V kind) const {
      CHILDTUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        const int slot = slot_of(lane, slots, i);
        if (slot >= slots.end) continue;
        const int place = places.of[slot];
        CHILDTUNE_UNROLLED
        for (int a = 0; a < kAverages; ++a) {
          if (a >= step.averages()) continue;
          encode(a, average_of(quad, a).of[i], scales.of[a], random_of(word_of(words, a), place),
                 step.state(kind, a, slot));
        }
      }
    }
  };
};

// What warp `warp_number` of the block of threads `block` does. `places` belongs to this warp alone.
template <class P, class Table, class Warp>
CHILDTUNE_INLINE void step_rounded_child_warp(const Table& table, uint32_t block, int warp_number, SlotPlaces& places,
                                              const Warp& warp) {
  if (is_skipped(table.header)) return;
  const RoundedItem& item = table.items[item_of_block(table, block)];  // a copy would take too many registers
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const int64_t packed_block = int64_t{kThreads / kWarp} * (block - item.first_block) + warp_number;
  if (packed_block >= packed_blocks(item.numel)) return;
  const MaskKey key{of_class.seed, of_class.step, item.param_index};
  const int64_t offset = item.child.offsets[packed_block];
  warp.run_rounded(RoundedChildStep<P>{{item, of_class.constants, packed_block * kPackedBlock, offset}, key}, places);
}

}  // namespace childtune
