// The sum of the squares of one chunk of a gradient, of which the norm of all gradients is made.
#pragma once

#include "core/dtypes.h"
#include "core/packed_mask.h"
#include "core/step_item.h"
#include "cpu/isa.h"
#include "cpu/layout.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// Squares in double (exact for float gradients), summed by halving: element i takes element i + width/2, for every
// width from 1024 down. The order is fixed, so that the norm has the same bits for every instruction set, thread count
// and backend.
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

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
