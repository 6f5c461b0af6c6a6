// The step on a GPU of parameters whose state is stored in fewer bits than it computes with, or whose weights are
// rounded stochastically, as functions for host and device: the CPU can run them in loops over blocks, warps and lanes.
//
// Lanes, tiles and masks are those of cuda/step_kernel.h. Each of a tile's two mask blocks has words of its own for
// rounding, which the lanes of a half warp draw, all of them the same. A block's codes cannot be made before the
// largest of its values is known, which the lanes find together.
//
// So a tile has the phase draw, and then each of its mask blocks load, update, most and store, with exchanges before
// update and store. A `Warp` runs them: GpuWarp (cuda/warp.h) does on a GPU.
#pragma once

#include "cuda/rounded_state.h"

namespace childtune {

// The averages of a lane's four values of a mask block, as they are stored: 16, 8 or 4 bytes of each.
struct PackedState {
  uint32_t words[kAverages][4];

  template <class V>
  CHILDTUNE_MEMBER void get(int average, int i, V& to) const {
    Four<V> four;
    memcpy(&four, words[average], sizeof(four));
    to = four.of[i];
  }
};

// The phases of one tile, each as one lane goes through it. kWhole: all of the tile's elements exist, and the quads of
// every stream are aligned.
template <class P, bool kMasked, bool kWhole>
struct RoundedTile {
  struct Loaded {
    Four<P> param, grad;
    PackedState state;
    PerAverage scales;
  };
  static constexpr bool kDraws = kMasked;

  const RoundedItem& item;
  const AdamWConstants<float>& constants;
  MaskKey key;
  uint32_t keep_threshold;
  int64_t begin;  // of the tile, in the item's arrays

  CHILDTUNE_MEMBER QuadSpan quad_span(int lane, int half, Stream stream) const {
    const int64_t at = begin + kMaskBlock * half + 4 * lane;
    return kWhole ? QuadSpan{at, 0, 4, true} : quad_at(at, item.numel, (item.vectors >> stream & 1) != 0);
  }
  static CHILDTUNE_MEMBER Stream stream_of(int average) { return static_cast<Stream>(kExpAvg + average); }
  CHILDTUNE_MEMBER int64_t block_of(int half) const { return begin / kMaskBlock + half; }
  CHILDTUNE_MEMBER uint64_t mask_block() const { return item.first_mask_block + static_cast<uint64_t>(block_of(0)); }
  CHILDTUNE_MEMBER bool has_codes() const { return item.state == StateKind::kCodes; }
  CHILDTUNE_MEMBER int averages() const { return averages_of(item); }

  // Loads the lane's values in mask block `half` of the tile.
  CHILDTUNE_MEMBER Loaded load(int lane, int half) const {
    Loaded loaded{};
    load_four(item.data[kParam], quad_span(lane, half, kParam), loaded.param);
    load_four(item.data[kGrad], quad_span(lane, half, kGrad), loaded.grad);
    loaded.scales = load_scales(item, block_of(half));
    visit_state(item.state, StateLoader{*this, lane, half, loaded.state});
    return loaded;
  }

  struct StateLoader {
    const RoundedTile& tile;
    int lane, half;
    PackedState& state;

    template <class V>
    CHILDTUNE_MEMBER void visit(V) const {
      CHILDTUNE_UNROLLED
      for (int a = 0; a < kAverages; ++a) {
        if (a >= tile.averages()) continue;
        Four<V> four{};
        load_four(tile.item.data[stream_of(a)], tile.quad_span(lane, half, stream_of(a)), four);
        memcpy(state.words[a], &four, sizeof(four));
      }
    }
  };

  CHILDTUNE_MEMBER uint32_t draw(int lane) const { return draw_masks(key, mask_block(), lane, keep_threshold); }

  // Draws the words of mask block lane / 16 of the tile.
  CHILDTUNE_MEMBER RoundingWords draw_words(int lane) const {
    return rounding_words(key, mask_block() + static_cast<uint64_t>(lane / (kWarp / 2)));
  }

  // Updates the values, and stores the weights; returns them with their averages.
  CHILDTUNE_MEMBER Quad<float> update(int lane, int half, uint32_t kept, const RoundingWords& words,
                                      const Loaded& loaded) const {
    Quad<float> quad;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      quad.param.of[i] = childtune::load(loaded.param.of[i]);
      quad.grad.of[i] = childtune::load(loaded.grad.of[i]);
    }
    decode_state<4>(item, loaded.state, loaded.scales, 0, quad);
    update_quad<kMasked, true>(constants, kept, quad);
    Four<P> param;
    CHILDTUNE_UNROLLED
    for (int i = 0; i < 4; ++i) store_weight(item, quad.param.of[i], random_of(words.param, lane, i), param.of[i]);
    store_four(item.data[kParam], quad_span(lane, half, kParam), param);
    return quad;
  }

  static CHILDTUNE_MEMBER uint32_t random_of(uint32_t word, int lane, int i) {
    return rounding_bits(word, static_cast<uint32_t>(4 * lane + i));
  }

  // With codes: returns the largest magnitudes of the lane's values in mask block `half`.
  CHILDTUNE_MEMBER PerAverage most(int lane, int half, Quad<float>& quad) const {
    const int high = quad_span(lane, half, kParam).high;
    return sanitize_state((1u << high) - 1, quad);
  }

  // Stores the averages; `most` has the largest magnitudes in mask block `half`.
  CHILDTUNE_MEMBER void store(int lane, int half, const PerAverage& most, const RoundingWords& words,
                              Quad<float>& quad) const {
    const PerAverage scales = scales_for(most);
    visit_state(item.state, StateStorer{*this, lane, half, scales, words, quad});
    if (has_codes() && lane == 0) store_scales(item, block_of(half), scales);
  }

  struct StateStorer {
    const RoundedTile& tile;
    int lane, half;
    const PerAverage& scales;
    const RoundingWords& words;
    Quad<float>& quad;

    template <class V>
    CHILDTUNE_MEMBER void visit(V) const {
      CHILDTUNE_UNROLLED
      for (int a = 0; a < kAverages; ++a) {
        if (a >= tile.averages()) continue;
        Four<V> four;
        CHILDTUNE_UNROLLED
        for (int i = 0; i < 4; ++i) {
          encode(a, average_of(quad, a).of[i], scales.of[a], random_of(word_of(words, a), lane, i), four.of[i]);
        }
        store_four(tile.item.data[stream_of(a)], tile.quad_span(lane, half, stream_of(a)), four);
      }
    }
  };
};

// What warp `warp_number` of the block of threads `block` does.
template <class P, bool kMasked, class Table, class Warp>
CHILDTUNE_INLINE void step_rounded_warp(const Table& table, uint32_t block, int warp_number, const Warp& warp) {
  if (is_skipped(table.header)) return;
  const RoundedItem item = table.items[item_of_block(table, block)];
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const MaskKey key{of_class.seed, of_class.step, item.param_index};
  const int64_t first_tile = int64_t{kChunkTiles} * (block - item.first_block);
  for (int i = warp_number; i < kChunkTiles; i += kThreads / kWarp) {
    const int64_t begin = kTile * (first_tile + i);
    if (begin >= item.numel) return;
    if (begin + kTile <= item.numel && item.vectors == kAllVectors) {
      warp.run_rounded(RoundedTile<P, kMasked, true>{item, of_class.constants, key, of_class.keep_threshold, begin});
    } else {
      warp.run_rounded(RoundedTile<P, kMasked, false>{item, of_class.constants, key, of_class.keep_threshold, begin});
    }
  }
}

}  // namespace childtune
