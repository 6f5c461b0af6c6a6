// Adds the squares of a gradient to Fisher scores, over a range of one parameter.
#pragma once

#include "core/dtypes.h"
#include "core/fisher.h"
#include "core/mask.h"
#include "core/squares_item.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/layout.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int64_t kCopiedGrads = 1024;  // at a time, of a gradient that is not contiguous

// Returns whether every gradient was finite.
template <class P>
CHILDTUNE_OUT_OF_LINE bool add_squares(double weight, double grad_factor, const P* __restrict grad,
                                       float* __restrict score, int64_t count) {
  using T = typename ComputeType<P>::type;
  const T w = static_cast<T>(weight), factor = static_cast<T>(grad_factor);
  auto seen = non_finite_bit(T(0));
  for (int64_t begin = 0; begin < count; begin += kMaskBlock) {
    const int64_t end = begin + kMaskBlock < count ? begin + kMaskBlock : count;
    fetch_ahead(grad + begin, end - begin);
    fetch_ahead(score + begin, end - begin);
    CHILDTUNE_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) {
      const T g = load(grad[i]);
      seen |= non_finite_bit(g);
      add_square(w, factor, g, score[i]);
    }
  }
  return seen >> (8 * sizeof(seen) - 1) == 0;
}

template <class P>
bool accumulate_squares_typed(const SquaresItem& item, double weight, double grad_factor, int64_t begin, int64_t end) {
  const P* grad = static_cast<const P*>(item.grad);
  if (item.layout == nullptr) {
    return add_squares(weight, grad_factor, grad + begin, item.score + begin, end - begin);
  }
  bool finite = true;
  P copied[kCopiedGrads];
  for (int64_t at = begin; at < end; at += kCopiedGrads) {
    const int64_t count = end - at < kCopiedGrads ? end - at : kCopiedGrads;
    gather(grad, item.layout, 0, at, count, copied);
    finite = add_squares(weight, grad_factor, copied, item.score + at, count) && finite;
  }
  return finite;
}

bool accumulate_squares(const SquaresItem& item, double weight, double grad_factor, int64_t begin, int64_t end) {
  switch (item.dtype) {
    case DType::kFloat32:
      return accumulate_squares_typed<float>(item, weight, grad_factor, begin, end);
    case DType::kFloat64:
      return accumulate_squares_typed<double>(item, weight, grad_factor, begin, end);
    case DType::kBFloat16:
      return accumulate_squares_typed<BFloat16>(item, weight, grad_factor, begin, end);
    case DType::kFloat16:
      return accumulate_squares_typed<Float16>(item, weight, grad_factor, begin, end);
  }
  return false;
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
