// The compact step of a child network that rounds stochastically. The values of a packed block, which are in order in
// buffers, are decoded, updated and encoded together.
#pragma once

#include <type_traits>

#include "core/rounding.h"
#include "core/step_item.h"
#include "cpu/child_codes.h"
#include "cpu/child_kernel.h"
#include "cpu/isa.h"
#include "cpu/rounded_kernel.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// The blocks of a part of a parameter: the first of them, how many they are, and how many values each has.
struct PartBlocks {
  int64_t first;
  int count;
  int64_t values[kPartBlocks];
};

CHILDTUNE_INLINE PartBlocks blocks_of(const ChildPart& part, int64_t at) {
  PartBlocks blocks{at / kMaskBlock, (part.size + kMaskBlock - 1) / kMaskBlock, {}};
  for (int b = 0; b < blocks.count; ++b) {
    const uint8_t* bits = part.bits + b * (kMaskBlock / 8);
#if defined(CHILDTUNE_AVX2)
    uint64_t words[2];
    memcpy(words, bits, sizeof words);
    blocks.values[b] = __builtin_popcountll(words[0]) + __builtin_popcountll(words[1]);
#else
    blocks.values[b] = count_bits(bits, kMaskBlock / 8);
#endif
  }
  return blocks;
}

// What the blocks of a part drew (core/rounding.h), as PartEncoding has it.
struct PartWords {
  PerBlock<uint32_t> of_averages[kAverages], of_param;
};

CHILDTUNE_INLINE PartWords words_of(RoundingDraw& rounding, uint64_t first_block) {
  PartWords words;
  for (uint32_t b = 0; b < kPartBlocks; ++b) {
    const RoundingWords drawn = rounding.of(first_block + b);
    words.of_averages[0].of[b] = drawn.exp_avg >> kSpreadShift ^ b;
    words.of_averages[1].of[b] = drawn.exp_avg_sq >> kSpreadShift ^ b;
    words.of_averages[2].of[b] = drawn.max_exp_avg_sq >> kSpreadShift ^ b;
    words.of_param.of[b] = drawn.param >> kSpreadShift ^ b;
  }
  return words;
}

// Decodes the `count` values of a part.
CHILDTUNE_OUT_OF_LINE void decode_part(const StepItem& item, const Averages& a, const PartBlocks& blocks, int64_t count,
                                       const uint32_t* places) {
  if (item.state != StateKind::kCodes) return decode_block(item, a, in_lanes(count), blocks.first);
  for (int i = 0; i < a.count; ++i) {
    const uint8_t* codes = static_cast<const uint8_t*>(a.stored[i]);
    uint8_t scales[kPartBlocks] = {};
    memcpy(scales, item.scales[i] + blocks.first, static_cast<size_t>(blocks.count));
    PerBlock<float> factors;
    for (int b = 0; b < kPartBlocks; ++b) factors.of[b] = scale_of(scales[b]);
    for (int64_t j = 0; j < count; j += kLanes) {
      i == 0 ? decode_average_lanes(codes + j, factors, places + j, a.values[i] + j)
             : decode_square_lanes(codes + j, factors, places + j, a.values[i] + j);
    }
  }
}

// Finds the bits of the largest magnitude in each block.
CHILDTUNE_OUT_OF_LINE void find_largest(const float* values, const PartBlocks& blocks, PerBlock<uint32_t>* most) {
#if defined(CHILDTUNE_AVX2)
  __m256i rows[kPartBlocks];
  for (int b = 0; b < kPartBlocks; ++b) {
    rows[b] = largest_of(values, blocks.values[b]);
    values += blocks.values[b];
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(most->of), largest_of_each(rows));
#else
  for (int b = 0; b < kPartBlocks; ++b) {
    most->of[b] = largest_bits(values, blocks.values[b], in_lanes(blocks.values[b]));
    values += blocks.values[b];
  }
#endif
}

// Encodes the `count` values of a part in bytes.
CHILDTUNE_OUT_OF_LINE void encode_part(const StepItem& item, const Averages& a, const PartBlocks& blocks, int64_t count,
                                       const PartWords& words, const uint32_t* places) {
  PerBlock<uint32_t> most[kAverages];
  for (int i = 0; i < a.count; ++i) find_largest(a.values[i], blocks, &most[i]);
  uint32_t all = 0;
  for (int i = 0; i < a.count; ++i) {
    for (uint32_t of_block : most[i].of) all = all < of_block ? of_block : all;
  }
  if (all > kMostBits) {
    sanitize_block(a, count);
    for (int i = 0; i < a.count; ++i) find_largest(a.values[i], blocks, &most[i]);
  }
  for (int i = 0; i < a.count; ++i) {
    uint8_t* codes = static_cast<uint8_t*>(a.stored[i]);
    uint8_t scales[kPartBlocks];
    PartEncoding e{{}, {}, words.of_averages[i]};
    for (int b = 0; b < kPartBlocks; ++b) {
      const uint32_t scale = scale_byte(most[i].of[b]);
      scales[b] = static_cast<uint8_t>(scale);
      e.inverse.of[b] = inverse_scale_of(scale);
      e.least.of[b] = least_square_of(scale);
    }
    memcpy(item.scales[i] + blocks.first, scales, static_cast<size_t>(blocks.count));
    for (int64_t j = 0; j < count; j += kLanes) {
      i == 0 ? encode_average_lanes(a.values[i] + j, e, places + j, codes + j)
             : encode_square_lanes(a.values[i] + j, e, places + j, codes + j);
    }
  }
}

// Rounds floats to numbers that P holds, as round_randomly does; `words` is what their blocks drew.
template <class P>
CHILDTUNE_OUT_OF_LINE void round_part(float* values, int64_t count, const PerBlock<uint32_t>& words,
                                      const uint32_t* places) {
  uint32_t random[kRoom];
  for (int64_t j = 0; j < count; j += kLanes) random_lanes(words, places + j, random + j);
  round_randomly<P>(values, count, 0, random);
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
    if (in_buffers && n > 0) copy_averages(item, offset, n, false, b);
    const Averages a = averages_of(item, offset, in_buffers, b);
    float *weights, *grads;
    ChildFloats<P>::widen(moved, n, b, &weights, &grads);
    const PartBlocks blocks = blocks_of(part, at);
    decode_part(item, a, blocks, n, b.places);
    const Streams<float> s{weights, grads, a.values[0], a.values[1], a.values[2]};
    a.count == kAverages ? update_dense<true>(c, s, n) : update_dense<false>(c, s, n);
    const PartWords words = words_of(rounding, item.slice.offset / kMaskBlock + static_cast<uint64_t>(blocks.first));
    if (item.state == StateKind::kCodes) encode_part(item, a, blocks, n, words, b.places);
    for (int i = 0; i < a.count && item.state == StateKind::kBFloat16; ++i) {
      round_part<BFloat16>(a.values[i], n, words.of_averages[i], b.places);
      narrow_all(a.values[i], n, static_cast<BFloat16*>(a.stored[i]));
    }
    if (item.stochastic) round_part<P>(weights, n, words.of_param, b.places);
    ChildFloats<P>::narrow(moved, n, weights);
    if (in_buffers && n > 0) copy_averages(item, offset, n, true, b);
  };
  for_each_child_part<P>(item, c, begin, end, moved, b.places, update);
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
