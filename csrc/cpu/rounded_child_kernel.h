// The compact step of a child network that rounds stochastically. The values of a packed block, which are in order in
// buffers, are decoded and encoded block by block of the mask, and updated together.
#pragma once

#include <type_traits>

#include "core/rounding.h"
#include "core/step_item.h"
#include "cpu/child_kernel.h"
#include "cpu/isa.h"
#include "cpu/rounded_kernel.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// Counts the set bits of each block of a packed block's mask, of which `bytes` are there.
CHILDTUNE_INLINE void count_blocks(const uint8_t* bits, int bytes, int64_t* counts) {
  for (int i = 0; i < bytes; i += kMaskBlock / 8) {
    uint64_t words[2] = {0, 0};
    memcpy(words, bits + i, bytes - i < kMaskBlock / 8 ? static_cast<size_t>(bytes - i) : sizeof words);
#if defined(CHILDTUNE_AVX2)
    counts[i / (kMaskBlock / 8)] = __builtin_popcountll(words[0]) + __builtin_popcountll(words[1]);
#else
    counts[i / (kMaskBlock / 8)] = count_bits(reinterpret_cast<const uint8_t*>(words), sizeof words);
#endif
  }
}

// The weights and gradients of a child network as floats: where ChildBuffers has them, or in buffers.
template <class P>
struct ChildFloats {
  using Moved = ChildBuffers<P>;
  static constexpr bool kAreFloats = std::is_same_v<typename Moved::Stored, float>;

  static void widen(Moved& moved, int64_t count, RoundedBuffers& b, float** param, float** grad) {
    if constexpr (kAreFloats) {
      *param = moved.param;
      *grad = moved.grad;
    } else {
      for (int64_t j = 0; j < count; ++j) {
        b.param[j] = load(moved.param[j]);
        b.grad[j] = load(moved.grad[j]);
      }
      *param = b.param;
      *grad = b.grad;
    }
  }

  static void narrow(Moved& moved, int64_t count, const float* param) {
    if constexpr (!kAreFloats) {
      for (int64_t j = 0; j < count; ++j) store(moved.param[j], param[j]);
    }
  }
};

// Steps the weights [begin, end) of a parameter with a child network, where `begin` is a multiple of 128.
template <class P>
void step_rounded_child(const StepItem& item, int64_t begin, int64_t end) {
  const auto c = item.constants.cast<float>();
  const bool in_buffers = item.state != StateKind::kComputed;  // where there is room for whole groups of lanes
  RoundingDraw rounding(item.key);
  RoundedBuffers b;
  ChildBuffers<P> moved;
  const auto update = [&](const ChildPart& part, int64_t at, int64_t offset, int64_t n) CHILDTUNE_LAMBDA {
    compress_spread(part.bits, part.bytes, b.spread);
    if (in_buffers && n > 0) copy_averages(item, offset, n, false, b);
    const Averages a = averages_of(item, offset, in_buffers, b);
    float *weights, *grads;
    ChildFloats<P>::widen(moved, n, b, &weights, &grads);
    int64_t counts[kPackedBlock / kMaskBlock];
    count_blocks(part.bits, part.bytes, counts);
    const auto each_block = [&](auto visit) CHILDTUNE_LAMBDA {
      int64_t first = 0;
      for (int i = 0; kMaskBlock * i < part.size; ++i) {
        visit(first, counts[i], at / kMaskBlock + i);  // also where there are none: their scale is 0
        first += counts[i];
      }
    };
    each_block(
        [&](int64_t first, int64_t count, int64_t block) { decode_block(item, a, first, in_lanes(count), block); });
    const Streams<float> s{weights, grads, a.values[0], a.values[1], a.values[2]};
    a.count == kAverages ? update_dense<true>(c, s, n) : update_dense<false>(c, s, n);
    each_block([&](int64_t first, int64_t count, int64_t block) {
      const RoundingWords words = rounding.of(item.slice.offset / kMaskBlock + static_cast<uint64_t>(block));
      encode_block(item, a, first, count, in_lanes(count), block, words, b.spread + first);
      if (item.stochastic) round_randomly<P>(weights + first, count, words.param, b.spread + first);
    });
    ChildFloats<P>::narrow(moved, n, weights);
    if (in_buffers && n > 0) copy_averages(item, offset, n, true, b);
  };
  for_each_child_part<P>(item, c, begin, end, moved, update);
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
