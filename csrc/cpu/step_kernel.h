// The CPU step over a range of one parameter. Each instruction set includes this file in a namespace of its own
// (CHILDTUNE_ISA), behind its target pragma; the loops are plain C++ that compilers turn into vectors of that set.
//
// Work goes in blocks of 128 elements, as the mask does. Arrays that are not contiguous are copied into buffers,
// updated by the same function, and copied back.

#include <utility>

#include "core/adamw.h"
#include "core/dtypes.h"
#include "core/fisher.h"
#include "core/score_key.h"
#include "cpu/layout.h"
#include "cpu/loops.h"

// How many bytes ahead of a loop memory is fetched by software prefetch: 0 leaves that to the processor.
#if !defined(CHILDTUNE_FETCH_AHEAD)
#define CHILDTUNE_FETCH_AHEAD 0
#endif

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

#include "cpu/mask_lanes.h"

constexpr int kLanes = kMaskCounters;  // elements per inner loop: a whole number of vectors in every set

template <class P>
struct Block {
  using T = typename ComputeType<P>::type;
  P* param;
  const P* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

// Fetches what lies `distance` bytes after the `count` elements at `at`.
template <class V>
CHILDTUNE_INLINE void fetch_ahead(const V* at, int64_t count, int64_t distance = CHILDTUNE_FETCH_AHEAD) {
  if (CHILDTUNE_FETCH_AHEAD == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(distance);
  for (uintptr_t line = begin; line < begin + count * sizeof(V); line += 64) {
    CHILDTUNE_PREFETCH(reinterpret_cast<const void*>(line));
  }
}

template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void fetch_ahead(const Block<P>& b, int64_t at, int64_t count) {
  fetch_ahead(b.param + at, count);
  fetch_ahead(b.grad + at, count);
  fetch_ahead(b.exp_avg + at, count);
  fetch_ahead(b.exp_avg_sq + at, count);
  if (kAmsgrad) fetch_ahead(b.max_exp_avg_sq + at, count);
}

// `count` elements, whose masks stand in `words` (unused without a mask) in turn.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_lanes(const AdamWConstants<T>& c, const Block<P>& b, int64_t at, int64_t count,
                                   const uint32_t* words, int half, uint32_t keep_threshold) {
  P* __restrict param = b.param + at;
  const P* __restrict grad = b.grad + at;
  T* __restrict exp_avg = b.exp_avg + at;
  T* __restrict exp_avg_sq = b.exp_avg_sq + at;
  T* __restrict max_exp_avg_sq = kAmsgrad ? b.max_exp_avg_sq + at : nullptr;
  CHILDTUNE_INDEPENDENT
  for (int64_t j = 0; j < count; ++j) {
    const bool keep = kMasked ? keeps(words[j], half, keep_threshold) : true;
    // All loads before all stores: the arrays often agree in the last 12 bits of their addresses, and a load right
    // after a store to such an address waits for it.
    T p = load(param[j]), m = exp_avg[j], v = exp_avg_sq[j], vmax = kAmsgrad ? max_exp_avg_sq[j] : T(0);
    adamw_update<kAmsgrad>(c, keep, load(grad[j]), p, m, v, vmax);
    store(param[j], p);
    exp_avg[j] = m;
    exp_avg_sq[j] = v;
    if (kAmsgrad) max_exp_avg_sq[j] = vmax;
  }
}

// Calls part(index) with each compile-time index below kMaskParts.
template <class Part, int... kPart>
CHILDTUNE_INLINE void for_each_part(Part part, std::integer_sequence<int, kPart...>) {
  (part(std::integral_constant<int, kPart>{}), ...);
}
using Parts = std::make_integer_sequence<int, kMaskParts>;

CHILDTUNE_OUT_OF_LINE void draw_block(const MaskKeys& keys, uint64_t block, MaskBits* bits) {
  MaskDraw draw;
  for_each_part([&](auto part) CHILDTUNE_LAMBDA { draw_part<part.value>(keys, block, draw, bits); }, Parts());
}

// One masked block: `bits` are its own, and those of the block after it are drawn into `next` meanwhile.
template <class P, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_block(const AdamWConstants<T>& c, const Block<P>& b, uint32_t keep_threshold,
                                   const MaskBits& bits, const MaskKeys& keys, uint64_t next_block, MaskBits* next) {
  MaskDraw draw;
  for_each_part(
      [&](auto part) CHILDTUNE_LAMBDA {
        constexpr int k = part.value;
        fetch_ahead<kAmsgrad>(b, kLanes * k, kLanes);
        update_lanes<P, true, kAmsgrad>(c, b, kLanes * k, kLanes, bits.word[k / 2], k % 2, keep_threshold);
        draw_part<k>(keys, next_block, draw, next);
      },
      Parts());
}

// `blocks` whole blocks, the first of which is mask block `block`.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_OUT_OF_LINE void update_blocks(const AdamWConstants<T>& constants, Block<P> b, int64_t blocks,
                                         uint32_t keep_threshold, const MaskKeys& keys, uint64_t block) {
  const AdamWConstants<T> c = constants;  // its own copy, which no store can change
  MaskBits bits[2];
  if (kMasked) draw_block(keys, block, &bits[0]);
  for (int64_t i = 0; i < blocks; ++i) {
    if (kMasked) {
      update_block<P, kAmsgrad>(c, b, keep_threshold, bits[i % 2], keys, block + i + 1, &bits[(i + 1) % 2]);
    } else {
      constexpr int64_t kPiece = CHILDTUNE_FETCH_AHEAD != 0 ? kLanes : kMaskBlock;  // a block's lines not all at once
      for (int64_t at = 0; at < kMaskBlock; at += kPiece) {
        fetch_ahead<kAmsgrad>(b, at, kPiece);
        update_lanes<P, false, kAmsgrad>(c, b, at, kPiece, nullptr, 0, 0);
      }
    }
    b.param += kMaskBlock;
    b.grad += kMaskBlock;
    b.exp_avg += kMaskBlock;
    b.exp_avg_sq += kMaskBlock;
    if (kAmsgrad) b.max_exp_avg_sq += kMaskBlock;
  }
}

template <class P, bool kAmsgrad>
Block<P> in_place(const StepItem& item, int64_t begin) {
  using T = typename ComputeType<P>::type;
  return {static_cast<P*>(item.data[kParam]) + begin, static_cast<const P*>(item.data[kGrad]) + begin,
          static_cast<T*>(item.data[kExpAvg]) + begin, static_cast<T*>(item.data[kExpAvgSq]) + begin,
          kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + begin : nullptr};
}

// `count` elements, which stand at `first` .. `first + count` of mask block `block`.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_part(const AdamWConstants<T>& c, const Block<P>& b, int64_t count, uint32_t keep_threshold,
                                  const MaskKeys& keys, uint64_t block, int first) {
  MaskBits bits;
  if (kMasked) draw_block(keys, block, &bits);
  for (int64_t at = 0; at < count;) {
    const int64_t part = (first + at) / kLanes, lane = (first + at) % kLanes;
    const int64_t lanes = kLanes - lane < count - at ? kLanes - lane : count - at;
    update_lanes<P, kMasked, kAmsgrad>(c, b, at, lanes, bits.word[part / 2] + lane, part % 2, keep_threshold);
    at += lanes;
  }
}

// The same from the item's element `begin` on; arrays that are not contiguous are copied, and copied back.
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
  const Block<P> b =
      copied ? Block<P>{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq} : in_place<P, kAmsgrad>(item, begin);
  update_part<P, kMasked, kAmsgrad>(c, b, count, item.keep_threshold, keys, block, first);
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

#include "cpu/child_kernel.h"

template <class P>
void step_typed(const StepItem& item, int64_t begin, int64_t end) {
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

// Squares in double (exact for float gradients), summed by halving: element i takes element i + width/2, for every
// width from 1024 down. A fixed order, so that the norm has the same bits for every instruction set, thread count and
// backend.
template <class P>
double sum_of_squares_typed(const StepItem& item, int64_t begin, int64_t end) {
  P grad[kNormChunk] = {};
  gather(item, kGrad, begin, end - begin, grad);
  double square[kNormChunk];
  for (int i = 0; i < kNormChunk; ++i) {
    const double g = static_cast<double>(load(grad[i]));
    square[i] = g * g;
  }
  if (item.child.bits != nullptr) {  // only the child network's gradient counts
    for (int i = 0; i < kNormChunk; ++i) square[i] = in_child(item.child.bits, begin + i) ? square[i] : 0.0;
  }
  for (int half = kNormChunk / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) square[i] += square[i + half];
  }
  return square[0];
}

double sum_of_squares(const StepItem& item, int64_t begin, int64_t end) {
  switch (item.dtype) {
    case DType::kFloat32:
      return sum_of_squares_typed<float>(item, begin, end);
    case DType::kFloat64:
      return sum_of_squares_typed<double>(item, begin, end);
    case DType::kBFloat16:
      return sum_of_squares_typed<BFloat16>(item, begin, end);
    case DType::kFloat16:
      return sum_of_squares_typed<Float16>(item, begin, end);
  }
  return 0.0;
}

#include "cpu/fisher_kernel.h"
#include "cpu/selection_kernel.h"

}  // namespace

#define CHILDTUNE_STRING_(x) #x
#define CHILDTUNE_STRING(x) CHILDTUNE_STRING_(x)
CpuKernels kernels() {
  return {CHILDTUNE_STRING(CHILDTUNE_ISA),
          step,
          sum_of_squares,
          accumulate_squares,
          count_upper_halves,
          count_lower_halves,
          write_above};
}

}  // namespace CHILDTUNE_ISA
}  // namespace childtune
