// The CPU step over a range of one parameter. Each instruction set compiles this file in a namespace of its own
// (CHILDTUNE_ISA), behind its target pragma; the loops are plain C++ that compilers turn into vectors of that set.
//
// Work goes in blocks of 128 elements, as the mask does. Arrays that are not contiguous are copied into buffers,
// updated by the same function, and copied back.
#pragma once

#include <utility>

#include "core/step_item.h"
#include "cpu/child_kernel.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/layout.h"
#include "cpu/loops.h"
#include "cpu/mask_lanes.h"
#include "cpu/rounded_child_kernel.h"
#include "cpu/rounded_kernel.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

#if defined(CHILDTUNE_AVX512)

// The roots of two parts of a block: one that is begun, and the one before, which is not ended yet.
template <class T>
using PartRoots = T[2][kLanes];

// Takes part kPart of updating one masked block, and of drawing the bits of the next one.
template <class P, bool kAmsgrad, int kPart, class T>
CHILDTUNE_INLINE void update_part_of_block(const AdamWConstants<T>& c, const Streams<P>& s, uint32_t keep_threshold,
                                           const MaskBits& bits, const MaskKeys& keys, uint64_t next_block,
                                           MaskDraw& draw, MaskBits* next, PartRoots<T>& roots) {
  static_assert(kAtOnce == kMaskCounters, "all counters of a block are drawn at once");
  fetch_ahead<kAmsgrad>(s, kLanes * kPart, kLanes);
  constexpr int kAt = kLanes * kPart;
  begin_update<P, true, kAmsgrad>(c, s, kAt, bits.word[kPart / 2], kPart % 2, keep_threshold, roots[kPart % 2]);
  draw_rounds<kRounds * kPart / kMaskParts, kRounds*(kPart + 1) / kMaskParts>(keys, next_block, 0, draw, next);
  if (kPart > 0) end_update(c, s, kAt - kLanes, roots[(kPart + 1) % 2]);
  if (kPart + 1 == kMaskParts) end_update(c, s, kAt, roots[kPart % 2]);
}

template <class P, bool kAmsgrad, class T, int... kPart>
CHILDTUNE_INLINE void update_parts(const AdamWConstants<T>& c, const Streams<P>& s, uint32_t keep_threshold,
                                   const MaskBits& bits, const MaskKeys& keys, uint64_t next_block, MaskBits* next,
                                   std::integer_sequence<int, kPart...>) {
  MaskDraw draw;
  PartRoots<T> roots;
  (update_part_of_block<P, kAmsgrad, kPart>(c, s, keep_threshold, bits, keys, next_block, draw, next, roots), ...);
}

// Updates one masked block, whose bits are `bits`, and meanwhile draws those of the block after it into `next`.
template <class P, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_block(const AdamWConstants<T>& c, const Streams<P>& s, uint32_t keep_threshold,
                                   const MaskBits& bits, const MaskKeys& keys, uint64_t next_block, MaskBits* next) {
  update_parts<P, kAmsgrad>(c, s, keep_threshold, bits, keys, next_block, next,
                            std::make_integer_sequence<int, kMaskParts>());
}

#else

// Updates one masked block, whose bits are `bits`, and draws those of the block after it into `next`.
template <class P, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_block(const AdamWConstants<T>& c, const Streams<P>& s, uint32_t keep_threshold,
                                   const MaskBits& bits, const MaskKeys& keys, uint64_t next_block, MaskBits* next) {
  draw_block(keys, next_block, next);
  for (int part = 0; part < kMaskParts; part += 2) {  // the two halves of a word, so that the shift is a constant
    const uint32_t* words = bits.word[part / 2];
    const int at = kLanes * part;
    fetch_ahead<kAmsgrad>(s, at, kLanes);
    update_all_lanes<P, true, kAmsgrad>(c, s, at, words, 0, keep_threshold);
    fetch_ahead<kAmsgrad>(s, at + kLanes, kLanes);
    update_all_lanes<P, true, kAmsgrad>(c, s, at + kLanes, words, 1, keep_threshold);
  }
}

#endif

// Updates `blocks` whole blocks, the first of which is mask block `block`.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_OUT_OF_LINE void update_blocks(const AdamWConstants<T>& constants, Streams<P> s, int64_t blocks,
                                         uint32_t keep_threshold, const MaskKeys& keys, uint64_t block) {
  const AdamWConstants<T> c = constants;  // a local copy, so that the compiler knows that no store changes it
  MaskBits bits[2];
  if (kMasked) draw_block(keys, block, &bits[0]);
  for (int64_t i = 0; i < blocks; ++i) {
    if (kMasked) {
      update_block<P, kAmsgrad>(c, s, keep_threshold, bits[i % 2], keys, block + i + 1, &bits[(i + 1) % 2]);
    } else {
      // Software prefetch asks for a few lines at a time: for all lines of a block at once, it is slower.
      for (int64_t at = 0; at < kMaskBlock; at += kLanes) {
        fetch_ahead<kAmsgrad>(s, at, kLanes);
        update_all_lanes<P, false, kAmsgrad>(c, s, at, nullptr, 0, 0);
      }
    }
    s.param += kMaskBlock;
    s.grad += kMaskBlock;
    s.exp_avg += kMaskBlock;
    s.exp_avg_sq += kMaskBlock;
    if (kAmsgrad) s.max_exp_avg_sq += kMaskBlock;
  }
}

template <class P, bool kAmsgrad>
Streams<P> in_place(const StepItem& item, int64_t begin) {
  using T = typename ComputeType<P>::type;
  return {static_cast<P*>(item.data[kParam]) + begin, static_cast<const P*>(item.data[kGrad]) + begin,
          static_cast<T*>(item.data[kExpAvg]) + begin, static_cast<T*>(item.data[kExpAvgSq]) + begin,
          kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + begin : nullptr};
}

// Copies `count` values, fewer than kLanes.
template <class V>
CHILDTUNE_OUT_OF_LINE void copy_few(const V* from, int64_t count, V* to) {
  CHILDTUNE_UNROLL
  for (int n = kLanes / 2; n > 0; n /= 2) {
    if (!(count & n)) continue;
    memcpy(to, from, n * sizeof *to);
    from += n;
    to += n;
  }
}

// Copies `count` values to the places from `lane` on of kLanes, and writes zeros to the others.
template <class V>
CHILDTUNE_INLINE void copy_to_lanes(const V* from, int64_t count, V* lanes, int64_t lane) {
  memset(lanes, 0, kLanes * sizeof *lanes);
  copy_few(from, count, lanes + lane);
}

// Updates `count` elements, which stand at `first` .. `first + count` of mask block `block`: kLanes at once, or copies
// of fewer.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_part(const AdamWConstants<T>& c, const Streams<P>& s, int64_t count,
                                  uint32_t keep_threshold, const MaskKeys& keys, uint64_t block, int first) {
  MaskBits bits;
  if (kMasked) draw_block(keys, block, &bits);
  P param[kLanes], grad[kLanes];
  T exp_avg[kLanes], exp_avg_sq[kLanes], max_exp_avg_sq[kLanes];
  const Streams<P> copies{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq};
  for (int64_t at = 0; at < count;) {
    const int64_t part = (first + at) / kLanes, lane = (first + at) % kLanes;
    const int64_t lanes = kLanes - lane < count - at ? kLanes - lane : count - at;
    const bool few = lanes < kLanes;
    const Streams<P> here{s.param + at, s.grad + at, s.exp_avg + at, s.exp_avg_sq + at,
                          kAmsgrad ? s.max_exp_avg_sq + at : nullptr};
    if (few) {
      copy_to_lanes(here.param, lanes, param, lane);
      copy_to_lanes(here.grad, lanes, grad, lane);
      copy_to_lanes(here.exp_avg, lanes, exp_avg, lane);
      copy_to_lanes(here.exp_avg_sq, lanes, exp_avg_sq, lane);
      if (kAmsgrad) copy_to_lanes(here.max_exp_avg_sq, lanes, max_exp_avg_sq, lane);
    }
    update_all_lanes<P, kMasked, kAmsgrad>(c, few ? copies : here, 0, bits.word[part / 2], part % 2, keep_threshold);
    if (few) {
      copy_few(param + lane, lanes, here.param);
      copy_few(exp_avg + lane, lanes, here.exp_avg);
      copy_few(exp_avg_sq + lane, lanes, here.exp_avg_sq);
      if (kAmsgrad) copy_few(max_exp_avg_sq + lane, lanes, here.max_exp_avg_sq);
    }
    at += lanes;
  }
}

// Updates the item's elements from `begin` on, which stand at `first` .. `first + count` of mask block `block`. Copies
// arrays that are not contiguous to buffers, and back.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_OUT_OF_LINE void update_item_part(const AdamWConstants<T>& c, const StepItem& item, int64_t begin,
                                            int64_t count, const MaskKeys& keys, uint64_t block, int first) {
  P param[kMaskBlock], grad[kMaskBlock];
  T exp_avg[kMaskBlock], exp_avg_sq[kMaskBlock], max_exp_avg_sq[kMaskBlock];
  const bool copied = item.layout != nullptr;
  if (copied) {
    gather(item, kParam, begin, count, param);
    gather(item, kGrad, begin, count, grad);
    gather(item, kExpAvg, begin, count, exp_avg);
    gather(item, kExpAvgSq, begin, count, exp_avg_sq);
    if (kAmsgrad) gather(item, kMaxExpAvgSq, begin, count, max_exp_avg_sq);
  }
  const Streams<P> s =
      copied ? Streams<P>{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq} : in_place<P, kAmsgrad>(item, begin);
  update_part<P, kMasked, kAmsgrad>(c, s, count, item.keep_threshold, keys, block, first);
  if (!copied) return;
  scatter(item, kParam, begin, count, param);
  scatter(item, kExpAvg, begin, count, exp_avg);
  scatter(item, kExpAvgSq, begin, count, exp_avg_sq);
  if (kAmsgrad) scatter(item, kMaxExpAvgSq, begin, count, max_exp_avg_sq);
}

template <class P, bool kMasked, bool kAmsgrad>
void step_range(const StepItem& item, int64_t begin, int64_t end) {
  const auto c = item.constants.cast<typename ComputeType<P>::type>();
  const int64_t run = item.slice.run == 0 ? item.numel : item.slice.run;
  const MaskKeys keys(item.key);
  for (int64_t at = begin; at < end;) {
    const uint64_t element = item.slice.offset + at / run * item.slice.stride + at % run;
    const int64_t run_end = at - at % run + run < end ? at - at % run + run : end;
    int first = static_cast<int>(element % kMaskBlock);
    uint64_t block = element / kMaskBlock;
    while (at < run_end) {
      const int64_t whole = first == 0 && item.layout == nullptr ? (run_end - at) / kMaskBlock : 0;
      if (whole > 0) {
        update_blocks<P, kMasked, kAmsgrad>(c, in_place<P, kAmsgrad>(item, at), whole, item.keep_threshold, keys,
                                            block);
        at += whole * kMaskBlock;
        block += whole;
      } else {
        const int64_t count = kMaskBlock - first < run_end - at ? kMaskBlock - first : run_end - at;
        update_item_part<P, kMasked, kAmsgrad>(c, item, at, count, keys, block++, first);
        at += count;
        first = 0;
      }
    }
  }
}

template <class P>
void step_typed(const StepItem& item, int64_t begin, int64_t end) {
  if constexpr (sizeof(P) < 8) {
    if (is_rounded(item)) {
      return item.child.bits != nullptr ? step_rounded_child<P>(item, begin, end) : step_rounded<P>(item, begin, end);
    }
  }
  if (item.child.bits != nullptr) {
    item.data[kMaxExpAvgSq] ? step_child<P, true>(item, begin, end) : step_child<P, false>(item, begin, end);
  } else if (item.masked) {
    item.data[kMaxExpAvgSq] ? step_range<P, true, true>(item, begin, end)
                            : step_range<P, true, false>(item, begin, end);
  } else {
    item.data[kMaxExpAvgSq] ? step_range<P, false, true>(item, begin, end)
                            : step_range<P, false, false>(item, begin, end);
  }
}

void step(const StepItem& item, int64_t begin, int64_t end) {
  switch (item.dtype) {
    case DType::kFloat32:
      return step_typed<float>(item, begin, end);
    case DType::kFloat64:
      return step_typed<double>(item, begin, end);
    case DType::kBFloat16:
      return step_typed<BFloat16>(item, begin, end);
    case DType::kFloat16:
      return step_typed<Float16>(item, begin, end);
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
