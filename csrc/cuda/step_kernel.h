// The step on a GPU, as functions for host and device: the CPU can run them in loops over blocks, warps and lanes.
//
// A lane takes elements 4 * lane .. 4 * lane + 3 of both mask blocks of a tile, so that a warp reads and writes whole
// lines, 16 bytes a lane where an element has 4. Each lane draws one Philox counter: lane l draws counter l % 16 of
// mask block l / 16. A counter's eight numbers belong to eight elements, 16 apart, most of which other lanes take, so
// the lanes vote eight times: vote k collects bit k of every lane. Since core/mask.h gives neighbouring elements to
// neighbouring counters, vote k holds the masks of elements 16 * k .. 16 * k + 15 of both blocks, in order, one block
// in each half. A lane needs only vote lane / 4.
//
// So a tile has the phases load, draw and update, with the votes before the update. A `Warp` runs them: GpuWarp
// (cuda/warp.h) does on a GPU.
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

template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void load_quad(void* const* data, const QuadSpan& span, Quad<P>& quad) {
  load_four(data[kParam], span, quad.param);
  load_four(data[kGrad], span, quad.grad);
  load_four(data[kExpAvg], span, quad.exp_avg);
  load_four(data[kExpAvgSq], span, quad.exp_avg_sq);
  if (kAmsgrad) load_four(data[kMaxExpAvgSq], span, quad.max_exp_avg_sq);
}

template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void store_quad(void* const* data, const QuadSpan& span, const Quad<P>& quad) {
  store_four(data[kParam], span, quad.param);
  store_four(data[kExpAvg], span, quad.exp_avg);
  store_four(data[kExpAvgSq], span, quad.exp_avg_sq);
  if (kAmsgrad) store_four(data[kMaxExpAvgSq], span, quad.max_exp_avg_sq);
}

// The phases of one tile, each as one lane goes through it.
template <class P, bool kMasked, bool kAmsgrad>
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
    const int64_t before = span.low - at, there = span.high - at;
    const int low = before > 0 ? (before < 4 ? static_cast<int>(before) : 4) : 0;
    const int high = there < 4 ? (there > 0 ? static_cast<int>(there) : 0) : 4;
    return {at, low, high, item.vectors && low == 0 && high == 4};
  }

  CHILDTUNE_MEMBER Loaded load(int lane) const {
    Loaded loaded;
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      loaded.quad[half] = {};
      load_quad<kAmsgrad>(item.data, quad_span(lane, half), loaded.quad[half]);
    }
    return loaded;
  }

  // Returns in bit k whether half-word k % 2 of word k / 2 of the lane's counter keeps its element.
  CHILDTUNE_MEMBER uint32_t draw(int lane) const {
    const Philox4 words = mask_words(key, span.mask_block + static_cast<uint64_t>(lane / kMaskCounters),
                                     static_cast<uint32_t>(lane % kMaskCounters));
    uint32_t bits = 0;
    CHILDTUNE_UNROLLED
    for (int k = 0; k < 8; ++k) {
      bits |= static_cast<uint32_t>(keeps(words.word[k / 2], k % 2, keep_threshold)) << k;
    }
    return bits;
  }

  // `vote` is number lane / 4 of the eight.
  CHILDTUNE_MEMBER void update(int lane, uint32_t vote, Loaded& loaded) const {
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const uint32_t keep = kMasked ? vote >> (16 * half + 4 * (lane % 4)) : ~0u;
      Quad<P>& quad = loaded.quad[half];
      CHILDTUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        T param = childtune::load(quad.param.of[i]);
        adamw_update<kAmsgrad>(constants, (keep >> i & 1) != 0, T(childtune::load(quad.grad.of[i])), param,
                               quad.exp_avg.of[i], quad.exp_avg_sq.of[i], quad.max_exp_avg_sq.of[i]);
        store(quad.param.of[i], param);
      }
      store_quad<kAmsgrad>(item.data, quad_span(lane, half), quad);
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
    warp.run(TileStep<P, kMasked, kAmsgrad>{item, of_class.constants, key, of_class.keep_threshold, span});
  }
}

}  // namespace childtune
