// Adds the squares of one gradient to Fisher scores on a GPU, as functions for host and device: the CPU can run them in
// loops over blocks and threads.
#pragma once

#include "core/constants.h"
#include "core/dtypes.h"
#include "core/fisher.h"
#include "cuda/launch.h"
#include "cuda/quad.h"

namespace childtune {

constexpr int kSquaresRounds = 4;                                 // a thread takes two quads in each
constexpr int kSquaresChunk = kSquaresRounds * 2 * 4 * kThreads;  // elements of a block of threads

// The argument of the kernel `add_squares`, by value. All pointers are the device's.
struct SquaresArgument {
  const void* grad;       // contiguous
  float* score;           // contiguous
  const double* squares;  // the sum of this gradient's squares, by which it is clipped; nullptr: it is not clipped
  uint8_t* finite;        // becomes 0 if the gradient has an infinity or a NaN
  int64_t numel;
  double weight, grad_factor, grad_clip;
  DType dtype;   // of the gradient
  bool vectors;  // every group of four elements is aligned
};

template <class P>
CHILDTUNE_INLINE void add_squares_typed(const SquaresArgument& argument, int64_t begin, int thread) {
  using T = typename ComputeType<P>::type;
  double factor = argument.grad_factor;
  if (argument.squares != nullptr) factor *= clip_factor(argument.grad_clip, *argument.squares, factor);
  const T weight = static_cast<T>(argument.weight), grad_factor = static_cast<T>(factor);
  auto seen = non_finite_bit(T(0));
  for (int round = 0; round < kSquaresRounds; ++round) {
    QuadSpan span[2];
    Four<P> grad[2];
    Four<float> score[2];
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const int quad = (2 * round + half) * kThreads + thread;
      span[half] = quad_at(begin + 4 * quad, argument.numel, argument.vectors);
      grad[half] = {};
      score[half] = {};
      load_four(argument.grad, span[half], grad[half]);
      load_four(argument.score, span[half], score[half]);
    }
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      CHILDTUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        const T g = load(grad[half].of[i]);
        seen |= non_finite_bit(g);
        add_square(weight, grad_factor, g, score[half].of[i]);
      }
      store_four(argument.score, span[half], score[half]);
    }
  }
  // Several threads may write this at once, which does no harm: all of them write 0.
  if (seen >> (8 * sizeof(seen) - 1) != 0) *argument.finite = 0;
}

// What thread `thread` of the block of threads `block` does.
CHILDTUNE_INLINE void add_squares(const SquaresArgument& argument, uint32_t block, int thread) {
  const int64_t begin = int64_t{kSquaresChunk} * block;
  switch (argument.dtype) {
    case DType::kFloat32:
      return add_squares_typed<float>(argument, begin, thread);
    case DType::kFloat64:
      return add_squares_typed<double>(argument, begin, thread);
    case DType::kBFloat16:
      return add_squares_typed<BFloat16>(argument, begin, thread);
    case DType::kFloat16:
      return add_squares_typed<Float16>(argument, begin, thread);
  }
}

}  // namespace childtune
