// The step on a GPU, as functions for host and device: the CPU can run them in loops over blocks, warps and lanes.
//
// A lane takes elements 4 * lane .. 4 * lane + 3 of both mask blocks of a tile, so that a warp reads and writes whole
// lines, 16 bytes a lane where the dtype has 4. It draws one Philox counter: lane l counter l % 16 of mask block l
// / 16. Its eight numbers belong to eight elements, 16 apart, most of which are other lanes'. The exchange is a vote
// for each of the eight: vote k collects bit k of every lane, and since core/mask.h gives neighbouring elements to
// neighbouring counters, it holds the masks of elements 16 * k .. 16 * k + 15 of both blocks, in order, one block in
// each half. A lane needs only vote lane / 4.
//
// So a tile has phases: load, draw, (votes,) update. A `Warp` runs them: cuda/warp.h as a warp of the GPU does.
#pragma once

#include "core/adamw.h"
#include "core/dtypes.h"
#include "cuda/step_table.h"

namespace childtune {

// Four neighbouring elements, which one or two instructions move where they are aligned.
template <class V>
struct alignas(4 * sizeof(V) < 16 ? 4 * sizeof(V) : 16) Four {
  V of[4];
};

// Four elements' worth of a step.
template <class P>
struct Quad {
  using T = typename ComputeType<P>::type;
  Four<P> param, grad;
  Four<T> exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// Where a quad lies in an item's arrays, and which of its elements, [low, high), are there.
struct QuadSpan {
  int64_t at;
  int low, high;
  bool vector;  // all, and aligned
};

template <class V>
CHILDTUNE_INLINE V* element(void* const* data, Stream stream, int64_t at) {
  return static_cast<V*>(data[stream]) + at;
}

template <class V>
CHILDTUNE_INLINE Four<V>& four(void* const* data, Stream stream, int64_t at) {
  return *reinterpret_cast<Four<V>*>(element<V>(data, stream, at));
}

template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void load_quad(void* const* data, const QuadSpan& span, Quad<P>& quad) {
  using T = typename ComputeType<P>::type;
  if (span.vector) {
    quad.param = four<P>(data, kParam, span.at);
    quad.grad = four<P>(data, kGrad, span.at);
    quad.exp_avg = four<T>(data, kExpAvg, span.at);
    quad.exp_avg_sq = four<T>(data, kExpAvgSq, span.at);
    if (kAmsgrad) quad.max_exp_avg_sq = four<T>(data, kMaxExpAvgSq, span.at);
    return;
  }
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    if (i < span.low || i >= span.high) continue;
    quad.param.of[i] = *element<P>(data, kParam, span.at + i);
    quad.grad.of[i] = *element<P>(data, kGrad, span.at + i);
    quad.exp_avg.of[i] = *element<T>(data, kExpAvg, span.at + i);
    quad.exp_avg_sq.of[i] = *element<T>(data, kExpAvgSq, span.at + i);
    if (kAmsgrad) quad.max_exp_avg_sq.of[i] = *element<T>(data, kMaxExpAvgSq, span.at + i);
  }
}

template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void store_quad(void* const* data, const QuadSpan& span, const Quad<P>& quad) {
  using T = typename ComputeType<P>::type;
  if (span.vector) {
    four<P>(data, kParam, span.at) = quad.param;
    four<T>(data, kExpAvg, span.at) = quad.exp_avg;
    four<T>(data, kExpAvgSq, span.at) = quad.exp_avg_sq;
    if (kAmsgrad) four<T>(data, kMaxExpAvgSq, span.at) = quad.max_exp_avg_sq;
    return;
  }
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    if (i < span.low || i >= span.high) continue;
    *element<P>(data, kParam, span.at + i) = quad.param.of[i];
    *element<T>(data, kExpAvg, span.at + i) = quad.exp_avg.of[i];
    *element<T>(data, kExpAvgSq, span.at + i) = quad.exp_avg_sq.of[i];
    if (kAmsgrad) *element<T>(data, kMaxExpAvgSq, span.at + i) = quad.max_exp_avg_sq.of[i];
  }
}

// One tile's phases, each as one lane goes through it.
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

  // Bit k: whether half-word k % 2 of word k / 2 of the lane's counter keeps its element.
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

// What warp `warp_number` of block `block` does.
template <class P, bool kMasked, bool kAmsgrad, class Table, class Warp>
CHILDTUNE_INLINE void step_warp(const Table& table, uint32_t block, int warp_number, const Warp& warp) {
  if (table.header.found_inf != nullptr && *table.header.found_inf != 0.0f) return;
  const TableItem item = table.items[item_of_block(table, block)];  // a copy, or no stores become vectors
  const auto& step_class = table.classes[item.step_class];
  auto constants = step_class.constants;
  MaskKey key{step_class.seed, step_class.step, item.param_index};
  if (table.header.constants != nullptr) {
    const DeviceConstants& counted = table.header.constants[item.param_index];
    constants = counted.constants.cast<typename ComputeType<P>::type>();
    key.step = counted.step;
  }
  const int64_t first_tile = int64_t{kChunkTiles} * (block - item.first_block);
  for (int i = warp_number; i < kChunkTiles; i += kThreads / kWarp) {
    const TileSpan span = tile_span(item, first_tile + i);
    if (span.low >= span.high) return;
    warp.run(TileStep<P, kMasked, kAmsgrad>{item, constants, key, step_class.keep_threshold, span});
  }
}

}  // namespace childtune
