// The update of neighbouring elements of one parameter: a loop that the compiler turns into vectors.
#pragma once

#include "core/adamw.h"
#include "core/dtypes.h"
#include "core/mask.h"
#include "cpu/half_lanes.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// Where the arrays of a step lie (enum Stream in core/step_item.h). P is the type that parameters are stored in.
template <class P>
struct Streams {
  using T = typename ComputeType<P>::type;
  P* param;
  const P* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

// Fetches the cache lines, of 64 bytes, that lie `distance` bytes after the `count` elements at `at`.
template <class V>
CHILDTUNE_INLINE void fetch_ahead(const V* at, int64_t count, int64_t distance = CHILDTUNE_FETCH_AHEAD) {
  if (CHILDTUNE_FETCH_AHEAD == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(distance);
  // Compared as addresses, which a compiler cannot fold away, since a sum of unsigned numbers may wrap: the branch
  // keeps the fetches where they stand. Where GCC gathers those of several arrays, a step takes a twentieth more.
  for (uintptr_t line = begin; line < begin + count * sizeof(V); line += 64) {
    CHILDTUNE_PREFETCH(reinterpret_cast<const void*>(line));
  }
}

// Fetches ahead of `count` elements from `at` on, in each array; `at` is a multiple of kLanes. A cache line of 16-bit
// weights is fetched with its first half.
template <bool kAmsgrad, class P>
CHILDTUNE_INLINE void fetch_ahead(const Streams<P>& s, int64_t at, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(P);
  if (kLine <= kLanes || at % kLine == 0) {
    fetch_ahead(s.param + at, count < kLine ? kLine : count);
    fetch_ahead(s.grad + at, count < kLine ? kLine : count);
  }
  fetch_ahead(s.exp_avg + at, count);
  fetch_ahead(s.exp_avg_sq + at, count);
  if (kAmsgrad) fetch_ahead(s.max_exp_avg_sq + at, count);
}

// Updates `count` elements from `at` on. With a mask, element j is kept by half-word `half` of words[j]; without one,
// `words` may be nullptr.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_lanes(const AdamWConstants<T>& c, const Streams<P>& s, int64_t at, int64_t count,
                                   const uint32_t* words, int half, uint32_t keep_threshold) {
  P* __restrict param = s.param + at;
  const P* __restrict grad = s.grad + at;
  T* __restrict exp_avg = s.exp_avg + at;
  T* __restrict exp_avg_sq = s.exp_avg_sq + at;
  T* __restrict max_exp_avg_sq = kAmsgrad ? s.max_exp_avg_sq + at : nullptr;
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

// Updates kLanes elements from `at` on, as update_lanes does.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void update_all_lanes(const AdamWConstants<T>& c, const Streams<P>& s, int64_t at,
                                       const uint32_t* words, int half, uint32_t keep_threshold) {
  if constexpr (sizeof(P) == 2) {
    float param[kLanes], grad[kLanes];
    widen_lanes(s.param + at, param);
    widen_lanes(s.grad + at, grad);
    const Streams<float> wide{param, grad, s.exp_avg + at, s.exp_avg_sq + at,
                              kAmsgrad ? s.max_exp_avg_sq + at : nullptr};
    update_lanes<float, kMasked, kAmsgrad>(c, wide, 0, kLanes, words, half, keep_threshold);
    narrow_lanes(param, s.param + at);
  } else {
    update_lanes<P, kMasked, kAmsgrad>(c, s, at, kLanes, words, half, keep_threshold);
  }
}

// An update of kLanes elements from `at` on in two halves, so that others may stand between them: what waits for a root
// does not fill the processor's queue then. The first half updates the averages and writes the roots to `roots`, by
// which the second one updates the weights.
template <class P, bool kMasked, bool kAmsgrad, class T>
CHILDTUNE_INLINE void begin_update(const AdamWConstants<T>& c, const Streams<P>& s, int64_t at, const uint32_t* words,
                                   int half, uint32_t keep_threshold, T* __restrict roots) {
  T widened[sizeof(P) == 2 ? kLanes : 1];
  if constexpr (sizeof(P) == 2) widen_lanes(s.grad + at, widened);
  T* __restrict exp_avg = s.exp_avg + at;
  T* __restrict exp_avg_sq = s.exp_avg_sq + at;
  T* __restrict max_exp_avg_sq = kAmsgrad ? s.max_exp_avg_sq + at : nullptr;
  CHILDTUNE_INDEPENDENT
  CHILDTUNE_ROLLED
  for (int64_t j = 0; j < kLanes; ++j) {
    const bool keep = kMasked ? keeps(words[j], half, keep_threshold) : true;
    T m = exp_avg[j], v = exp_avg_sq[j], vmax = kAmsgrad ? max_exp_avg_sq[j] : T(0);
    T grad;
    if constexpr (sizeof(P) == 2) {
      grad = widened[j];
    } else {
      grad = s.grad[at + j];
    }
    roots[j] = square_root(update_moments<kAmsgrad>(c, keep, grad, m, v, vmax));
    exp_avg[j] = m;
    exp_avg_sq[j] = v;
    if (kAmsgrad) max_exp_avg_sq[j] = vmax;
  }
}

template <class P, class T>
CHILDTUNE_INLINE void end_update(const AdamWConstants<T>& c, const Streams<P>& s, int64_t at,
                                 const T* __restrict roots) {
  const T* __restrict exp_avg = s.exp_avg + at;
  if constexpr (sizeof(P) == 2) {
    T param[kLanes];
    widen_lanes(s.param + at, param);
    CHILDTUNE_INDEPENDENT
    CHILDTUNE_ROLLED
    for (int64_t j = 0; j < kLanes; ++j) param[j] = updated_weight<true>(c, param[j], exp_avg[j], roots[j]);
    narrow_lanes(param, s.param + at);
  } else {
    P* __restrict param = s.param + at;
    CHILDTUNE_INDEPENDENT
    CHILDTUNE_ROLLED
    for (int64_t j = 0; j < kLanes; ++j) param[j] = updated_weight<true>(c, param[j], exp_avg[j], roots[j]);
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
