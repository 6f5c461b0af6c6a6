// The step on a GPU, as functions for host and device: the CPU can run them in loops over blocks, warps and lanes.
//
// A lane takes elements 4 * lane .. 4 * lane + 3 of both mask blocks of a tile, so that a warp reads and writes whole
// lines, 16 bytes a lane where an element has 4. Each lane draws one Philox counter: lane l draws counter l % 16 of
// mask block l / 16. A counter's eight numbers belong to eight elements, 16 apart, most of which other lanes take, so
// the lanes exchange them. Since core/mask.h gives neighbouring elements to neighbouring counters, a lane's elements of
// one mask block have number lane / 4 of four neighbouring counters: those of lanes 4 * (lane % 4) and the next three
// for the first mask block, and 16 lanes further for the second.
//
// So a tile has the phases load, draw and update, with the exchange before the update. A `Warp` runs them: GpuWarp
// (cuda/warp.h) does on a GPU. Most tiles are whole and aligned, and these have code of their own, without a question
// about the bounds of quads.
#pragma once

#include "core/adamw.h"
#include "core/dtypes.h"
#include "cuda/quad.h"
#include "cuda/step_table.h"

namespace childtune {

// Four elements of every stream of a step.
template <class P>
struct Quad {
  using T = typename ComputeType<P>::type;
  Four<P> param, grad;
  Four<T> exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// What a lane is told about the masks of its elements: bit 8 * i of of[half] is that of element i of the quad in mask
// block `half` of the tile.
struct Kept {
  uint32_t of[2];
};

// Returns in bit k whether half-word k % 2 of word k / 2 of a lane's counter keeps its element; `mask_block` is the
// first one of the tile.
CHILDTUNE_INLINE uint32_t draw_masks(const MaskKey& key, uint64_t mask_block, int lane, uint32_t keep_threshold) {
  const Philox4 words = mask_words(key, mask_block + static_cast<uint64_t>(lane / kMaskCounters),
                                   static_cast<uint32_t>(lane % kMaskCounters));
  uint32_t bits = 0;
  CHILDTUNE_UNROLLED
  for (int k = 0; k < 8; ++k) {
    bits |= static_cast<uint32_t>(keeps(words.word[k / 2], k % 2, keep_threshold)) << k;
  }
  return bits;
}

template <bool kAmsgrad, class P, class Updated>
CHILDTUNE_INLINE void move_weights(Quad<P>& quad, const Updated& updated) {
  using T = typename ComputeType<P>::type;
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    const T second_moment = kAmsgrad ? quad.max_exp_avg_sq.of[i] : quad.exp_avg_sq.of[i];
    store(quad.param.of[i], updated(T(load(quad.param.of[i])), quad.exp_avg.of[i], second_moment));
  }
}

// Updates four weights and their state; `kept` is Kept's for them.
//
// Roots and quotients cost most on a GPU, and those of zeros ten times as much. So four weights that never had a
// gradient, as in rows of tokens that do not occur, go without; and so do quotients by 1.
template <bool kMasked, bool kAmsgrad, class P>
CHILDTUNE_INLINE void update_quad(const AdamWConstants<typename ComputeType<P>::type>& constants, uint32_t kept,
                                  Quad<P>& quad) {
  using T = typename ComputeType<P>::type;
  auto used = bits_of(T(0));
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    const bool keep = !kMasked || (kept >> (8 * i) & 1) != 0;
    const T second_moment = update_moments<kAmsgrad>(constants, keep, T(load(quad.grad.of[i])), quad.exp_avg.of[i],
                                                     quad.exp_avg_sq.of[i], quad.max_exp_avg_sq.of[i]);
    used |= bits_of(quad.exp_avg.of[i]) | bits_of(second_moment);
  }
  if (used == 0 && constants.eps > T(0)) {
    move_weights<kAmsgrad>(quad, [&](T param, T exp_avg, T) { return updated_at_zero(constants, param, exp_avg); });
  } else if (constants.bias_correction2_sqrt == T(1)) {
    move_weights<kAmsgrad>(quad, [&](T param, T exp_avg, T second) {
      return updated_weight<false>(constants, param, exp_avg, square_root(second));
    });
  } else {
    move_weights<kAmsgrad>(quad, [&](T param, T exp_avg, T second) {
      return updated_weight<true>(constants, param, exp_avg, square_root(second));
    });
  }
}

// The phases of one tile, each as one lane goes through it. kWhole: all of the tile's elements exist, and the quads of
// every stream are aligned.
template <class P, bool kMasked, bool kAmsgrad, bool kWhole>
struct TileStep {
  using T = typename ComputeType<P>::type;
  struct Loaded {
    Quad<P> quad[2];
  };
  static constexpr bool kDraws = kMasked;

  const TableItem& item;
  const AdamWConstants<T>& constants;
  MaskKey key;
  uint32_t keep_threshold;
  TileSpan span;

  CHILDTUNE_MEMBER QuadSpan quad_span(int lane, int half) const {
    const int64_t at = span.begin + kMaskBlock * half + 4 * lane;
    if (kWhole) return {at, 0, 4, true};
    const int64_t before = span.low - at, there = span.high - at;
    const int low = before > 0 ? (before < 4 ? static_cast<int>(before) : 4) : 0;
    const int high = there < 4 ? (there > 0 ? static_cast<int>(there) : 0) : 4;
    return {at, low, high, low == 0 && high == 4};
  }

  // Returns the span as it is for one stream.
  CHILDTUNE_MEMBER QuadSpan of_stream(QuadSpan quad, Stream stream) const {
    if (!kWhole) quad.vector = quad.vector && (item.vectors >> stream & 1) != 0;
    return quad;
  }

  CHILDTUNE_MEMBER Loaded load(int lane) const {
    Loaded loaded;
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      Quad<P>& quad = loaded.quad[half];
      quad = {};
      const QuadSpan at = quad_span(lane, half);
      load_four(item.data[kParam], of_stream(at, kParam), quad.param);
      load_four(item.data[kGrad], of_stream(at, kGrad), quad.grad);
      load_four(item.data[kExpAvg], of_stream(at, kExpAvg), quad.exp_avg);
      load_four(item.data[kExpAvgSq], of_stream(at, kExpAvgSq), quad.exp_avg_sq);
      if (kAmsgrad) load_four(item.data[kMaxExpAvgSq], of_stream(at, kMaxExpAvgSq), quad.max_exp_avg_sq);
    }
    return loaded;
  }

  CHILDTUNE_MEMBER uint32_t draw(int lane) const { return draw_masks(key, span.mask_block, lane, keep_threshold); }

  CHILDTUNE_MEMBER void update(int lane, const Kept& kept, Loaded& loaded) const {
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      Quad<P>& quad = loaded.quad[half];
      update_quad<kMasked, kAmsgrad>(constants, kept.of[half], quad);
      const QuadSpan at = quad_span(lane, half);
      store_four(item.data[kParam], of_stream(at, kParam), quad.param);
      store_four(item.data[kExpAvg], of_stream(at, kExpAvg), quad.exp_avg);
      store_four(item.data[kExpAvgSq], of_stream(at, kExpAvgSq), quad.exp_avg_sq);
      if (kAmsgrad) store_four(item.data[kMaxExpAvgSq], of_stream(at, kMaxExpAvgSq), quad.max_exp_avg_sq);
    }
  }
};

// What warp `warp_number` of the block of threads `block` does.
template <class P, bool kMasked, bool kAmsgrad, class Table, class Warp>
CHILDTUNE_INLINE void step_warp(const Table& table, uint32_t block, int warp_number, const Warp& warp) {
  if (is_skipped(table.header)) return;
  const TableItem item = table.items[item_of_block(table, block)];  // a copy: else the compiler makes no vector stores
  const auto of_class = class_of(table.header, table.classes[item.step_class], item);
  const MaskKey key{of_class.seed, of_class.step, item.param_index};
  const int64_t first_tile = int64_t{kChunkTiles} * (block - item.first_block);
  for (int i = warp_number; i < kChunkTiles; i += kThreads / kWarp) {
    const TileSpan span = tile_span(item, first_tile + i);
    if (span.low >= span.high) return;
    const bool whole = span.begin >= span.low && span.begin + kTile <= span.high && item.vectors == kAllVectors;
    if (whole) {
      warp.run(TileStep<P, kMasked, kAmsgrad, true>{item, of_class.constants, key, of_class.keep_threshold, span});
    } else {
      warp.run(TileStep<P, kMasked, kAmsgrad, false>{item, of_class.constants, key, of_class.keep_threshold, span});
    }
  }
}

}  // namespace childtune
