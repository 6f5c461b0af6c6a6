// The CPU step over a range of one parameter. Each instruction set includes this file in a namespace of its own
// (CHILDTUNE_ISA), behind its target pragma; the loops are plain C++ that compilers turn into vectors of that set.
//
// Work goes in blocks of 128 elements, as the mask does. A whole block of contiguous arrays is updated in place; any
// other (the ends of a range, strided arrays) is copied into buffers, updated by the same function, and copied back.

#include "core/adamw.h"
#include "core/dtypes.h"
#include "cpu/layout.h"

// The iterations of the loop below touch different memory: no checks at run time before using vectors.
#if defined(__clang__)
#define CHILDTUNE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define CHILDTUNE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define CHILDTUNE_INDEPENDENT
#endif

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

#include "cpu/mask_lanes.h"

constexpr int kLanes = kMaskCounters;    // elements per inner loop: a whole number of vectors in every set

template <class P>
struct Block {
  using T = typename ComputeType<P>::type;
  P* param;
  const P* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

// Sixteen elements. `words` holds their random words (unused without a mask).
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_lanes(const AdamWConstants<T>& c, const Block<P>& b, int at, const uint32_t* words, int half,
                                   uint32_t keep_threshold) {
  P* __restrict param = b.param + at;
  const P* __restrict grad = b.grad + at;
  T* __restrict exp_avg = b.exp_avg + at;
  T* __restrict exp_avg_sq = b.exp_avg_sq + at;
  T* __restrict max_exp_avg_sq = kAmsgrad ? b.max_exp_avg_sq + at : nullptr;
  CHILDTUNE_INDEPENDENT
  for (int j = 0; j < kLanes; ++j) {
    const bool keep = kMasked ? keeps(words[j], half, keep_threshold) : true;
    // All loads before all stores: the arrays often agree in the last 12 bits of their addresses, and a load right after a
    // store to such an address waits for it.
    T p = load(param[j]), m = exp_avg[j], v = exp_avg_sq[j], vmax = kAmsgrad ? max_exp_avg_sq[j] : T(0);
    adamw_update<kAmsgrad>(c, keep, load(grad[j]), p, m, v, vmax);
    store(param[j], p);
    exp_avg[j] = m;
    exp_avg_sq[j] = v;
    if (kAmsgrad) max_exp_avg_sq[j] = vmax;
  }
}

template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_block(const AdamWConstants<T>& c, const Block<P>& b, const MaskKeys& keys, uint64_t block,
                                   uint32_t keep_threshold) {
  MaskBits bits;
  if (kMasked) draw(keys, block, &bits);
  for (int part = 0; part < kMaskBlock / kLanes; ++part) {
    update_lanes<P, kMasked, kAmsgrad>(c, b, kLanes * part, bits.word[part / 2], part % 2, keep_threshold);
  }
}

template <class P, bool kAmsgrad>
Block<P> in_place(const StepItem& item, int64_t begin) {
  using T = typename ComputeType<P>::type;
  return {static_cast<P*>(item.data[kParam]) + begin, static_cast<const P*>(item.data[kGrad]) + begin,
          static_cast<T*>(item.data[kExpAvg]) + begin, static_cast<T*>(item.data[kExpAvgSq]) + begin,
          kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + begin : nullptr};
}

// `count` elements from `begin` on, which stand at `first` .. `first + count` of mask block `block`.
template <class P, bool kMasked, bool kAmsgrad, class T>
void update_part(const AdamWConstants<T>& c, const StepItem& item, int64_t begin, int64_t count, const MaskKeys& keys, uint64_t block,
                 int first) {
  P param[kMaskBlock] = {}, grad[kMaskBlock] = {};
  T exp_avg[kMaskBlock] = {}, exp_avg_sq[kMaskBlock] = {}, max_exp_avg_sq[kMaskBlock] = {};
  gather(item, kParam, begin, count, param + first);
  gather(item, kGrad, begin, count, grad + first);
  gather(item, kExpAvg, begin, count, exp_avg + first);
  gather(item, kExpAvgSq, begin, count, exp_avg_sq + first);
  if (kAmsgrad) gather(item, kMaxExpAvgSq, begin, count, max_exp_avg_sq + first);
  const Block<P> buffers{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq};
  update_block<P, kMasked, kAmsgrad>(c, buffers, keys, block, item.keep_threshold);
  scatter(item, kParam, begin, count, param + first);
  scatter(item, kExpAvg, begin, count, exp_avg + first);
  scatter(item, kExpAvgSq, begin, count, exp_avg_sq + first);
  if (kAmsgrad) scatter(item, kMaxExpAvgSq, begin, count, max_exp_avg_sq + first);
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
      const int64_t count = kMaskBlock - first < run_end - at ? kMaskBlock - first : run_end - at;
      if (count == kMaskBlock && item.layout == nullptr) {
        const Block<P> b = in_place<P, kAmsgrad>(item, at);
        update_block<P, kMasked, kAmsgrad>(c, b, keys, block, item.keep_threshold);
      } else {
        update_part<P, kMasked, kAmsgrad>(c, item, at, count, keys, block, first);
      }
      at += count;
      first = 0;
      ++block;
    }
  }
}

template <class P>
void step_typed(const StepItem& item, int64_t begin, int64_t end) {
  if (item.masked) {
    item.data[kMaxExpAvgSq] ? step_range<P, true, true>(item, begin, end) : step_range<P, true, false>(item, begin, end);
  } else {
    item.data[kMaxExpAvgSq] ? step_range<P, false, true>(item, begin, end) : step_range<P, false, false>(item, begin, end);
  }
}

void step(const StepItem& item, int64_t begin, int64_t end) {
  switch (item.dtype) {
    case DType::kFloat32: return step_typed<float>(item, begin, end);
    case DType::kFloat64: return step_typed<double>(item, begin, end);
    case DType::kBFloat16: return step_typed<BFloat16>(item, begin, end);
    case DType::kFloat16: return step_typed<Float16>(item, begin, end);
  }
}

// Squares in double (exact for float gradients), summed by halving: element i takes element i + width/2, for every width
// from 1024 down. A fixed order, so that the norm has the same bits for every instruction set, thread count and backend.
template <class P>
double sum_of_squares_typed(const StepItem& item, int64_t begin, int64_t end) {
  P grad[kNormChunk] = {};
  gather(item, kGrad, begin, end - begin, grad);
  double square[kNormChunk];
  for (int i = 0; i < kNormChunk; ++i) {
    const double g = static_cast<double>(load(grad[i]));
    square[i] = g * g;
  }
  for (int half = kNormChunk / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) square[i] += square[i + half];
  }
  return square[0];
}

double sum_of_squares(const StepItem& item, int64_t begin, int64_t end) {
  switch (item.dtype) {
    case DType::kFloat32: return sum_of_squares_typed<float>(item, begin, end);
    case DType::kFloat64: return sum_of_squares_typed<double>(item, begin, end);
    case DType::kBFloat16: return sum_of_squares_typed<BFloat16>(item, begin, end);
    case DType::kFloat16: return sum_of_squares_typed<Float16>(item, begin, end);
  }
  return 0.0;
}

}  // namespace

#define CHILDTUNE_STRING_(x) #x
#define CHILDTUNE_STRING(x) CHILDTUNE_STRING_(x)
CpuKernels kernels() { return {CHILDTUNE_STRING(CHILDTUNE_ISA), step, sum_of_squares}; }

}  // namespace CHILDTUNE_ISA
}  // namespace childtune
