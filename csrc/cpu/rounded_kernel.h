// The CPU step that rounds stochastically: of state in bytes or in bfloat16, and of 16-bit parameters if asked.
//
// A block of the mask, or with a child network the values of a packed block, is decoded into float buffers that stay in
// the first-level cache, updated there as float32 state is, and encoded back. What is not a whole block of contiguous
// arrays is copied into buffers first, so that loops run over whole groups of lanes.
#pragma once

#include <type_traits>

#include "core/adamw.h"
#include "core/rounding.h"
#include "core/step_item.h"
#include "cpu/averages.h"
#include "cpu/child_kernel.h"
#include "cpu/code_lanes.h"
#include "cpu/coded_kernel.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/layout.h"
#include "cpu/loops.h"
#include "cpu/mask_lanes.h"
#include "cpu/spread.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kRoom = kPackedBlock + kLanes;      // of a buffer, in values
constexpr int kBlockLanes = kCodeBlock + kLanes;  // of a buffer for a block

CHILDTUNE_INLINE int64_t in_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Stores `count` floats as P, or a few more, up to whole groups of lanes.
template <class P>
CHILDTUNE_INLINE void narrow_all(const float* values, int64_t count, P* to) {
  for (int64_t j = 0; j < count; j += kLanes) narrow_lanes(values + j, to + j);
}

// Decodes the first `lanes` values, all of one block of the parameter if they are in bytes.
CHILDTUNE_OUT_OF_LINE void decode_block(const StepItem& item, const Averages& a, int64_t lanes, int64_t block) {
  for (int i = 0; i < a.count; ++i) {
    float* values = a.values[i];
    if (item.state == StateKind::kBFloat16) {
      const BFloat16* stored = static_cast<const BFloat16*>(a.stored[i]);
      for (int64_t j = 0; j < lanes; j += kLanes) widen_lanes(stored + j, values + j);
    } else if (item.state == StateKind::kCodes) {
      const uint8_t* codes = static_cast<const uint8_t*>(a.stored[i]);
      const float factor = scale_of(item.scales[i][block]);
      for (int64_t j = 0; j < lanes; j += kLanes) {
        i == 0 ? decode_average_lanes(codes + j, factor, values + j)
               : decode_square_lanes(codes + j, factor, values + j);
      }
    }
  }
}

CHILDTUNE_OUT_OF_LINE void encode_codes(const StepItem& item, const Averages& a, int64_t count, int64_t lanes,
                                        int64_t block, const uint32_t* words) {
  uint32_t most[kAverages], all = 0;
  const auto look = [&] {
    for (int i = 0; i < a.count; ++i) most[i] = largest_bits(a.values[i], count, lanes);
  };
  look();
  for (int i = 0; i < a.count; ++i) all = all < most[i] ? most[i] : all;
  if (all > kMostBits) {
    sanitize_block(a, count);
    look();
  }
  for (int i = 0; i < a.count; ++i) {
    const float* values = a.values[i];
    uint8_t* codes = static_cast<uint8_t*>(a.stored[i]);
    const uint32_t scale = scale_byte(most[i]);
    item.scales[i][block] = static_cast<uint8_t>(scale);
    const Encoding e = encoding_of(scale, words[i]);
    for (int64_t j = 0; j < lanes; j += kLanes) {
      i == 0 ? encode_average_lanes(values + j, e, kPlaces.of + j, codes + j)
             : encode_square_lanes(values + j, e, kPlaces.of + j, codes + j);
    }
  }
}

// Encodes the first `count` values, all of one block of the parameter; `lanes` is at least `count`.
CHILDTUNE_INLINE void encode_block(const StepItem& item, const Averages& a, int64_t count, int64_t lanes, int64_t block,
                                   const RoundingWords& drawn) {
  const uint32_t words[kAverages] = {drawn.exp_avg, drawn.exp_avg_sq, drawn.max_exp_avg_sq};
  if (item.state == StateKind::kCodes) encode_codes(item, a, count, lanes, block, words);
  if (item.state != StateKind::kBFloat16) return;
  for (int i = 0; i < a.count; ++i) {
    round_randomly<BFloat16>(a.values[i], lanes, words[i], kPlaces.of);
    narrow_all(a.values[i], lanes, static_cast<BFloat16*>(a.stored[i]));
  }
}

// Updates a block's floats; `bits` are its mask, nullptr for none.
template <bool kAmsgrad>
CHILDTUNE_OUT_OF_LINE void update_floats(const AdamWConstants<float>& constants, const Streams<float>& streams,
                                         int64_t lanes, uint32_t keep_threshold, const MaskBits* bits) {
  const AdamWConstants<float> c = constants;
  const Streams<float> s = streams;
  if (bits == nullptr) {
    for (int64_t at = 0; at < lanes; at += kLanes) update_all_lanes<float, false, kAmsgrad>(c, s, at, nullptr, 0, 0);
    return;
  }
  for (int64_t at = 0; at < lanes; at += 2 * kLanes) {  // the two halves of a word, so that the shift is a constant
    const uint32_t* words = bits->word[at / (2 * kLanes)];
    update_all_lanes<float, true, kAmsgrad>(c, s, at, words, 0, keep_threshold);
    if (at + kLanes < lanes) update_all_lanes<float, true, kAmsgrad>(c, s, at + kLanes, words, 1, keep_threshold);
  }
}

// The buffers of a block, or of a packed block with a child network.
struct RoundedBuffers {
  alignas(64) float param[kRoom] = {}, grad[kRoom] = {}, average[kAverages][kRoom] = {};
  alignas(64) uint8_t stored[kAverages][kRoom * sizeof(float)] = {};
  alignas(64) uint32_t places[kRoom] = {};
};

// Copies `count` values of an average from number `at` on to a buffer, or back.
template <class Stored>
CHILDTUNE_INLINE void copy_values(const StepItem& item, Stream stream, int64_t at, int64_t count, bool back,
                                  uint8_t* buffer) {
  auto* values = reinterpret_cast<Stored*>(buffer);
  auto* data = static_cast<Stored*>(item.data[stream]) + at;
  if (item.layout != nullptr && item.child.bits == nullptr) {
    back ? scatter(item, stream, at, count, values) : gather(item, stream, at, count, values);
  } else {
    const size_t bytes = static_cast<size_t>(count) * sizeof(Stored);
    if (!back) fetch_ahead(data, count, static_cast<int64_t>(bytes));  // the next part has about as many
    back ? memcpy(data, values, bytes) : memcpy(values, data, bytes);
  }
}

CHILDTUNE_OUT_OF_LINE void copy_averages(const StepItem& item, int64_t at, int64_t count, bool back,
                                         RoundedBuffers& b) {
  for (int i = 0; i < kAverages; ++i) {
    const auto stream = static_cast<Stream>(kExpAvg + i);
    if (item.data[stream] == nullptr) continue;
    switch (item.state) {
      case StateKind::kCodes:
        copy_values<uint8_t>(item, stream, at, count, back, b.stored[i]);
        break;
      case StateKind::kBFloat16:
        copy_values<uint16_t>(item, stream, at, count, back, b.stored[i]);
        break;
      case StateKind::kComputed:
        copy_values<float>(item, stream, at, count, back, b.stored[i]);
        break;
    }
  }
}

// Returns the averages of an item from value `at` on: in the item's own arrays, or where copy_averages copies them.
CHILDTUNE_INLINE Averages averages_of(const StepItem& item, int64_t at, bool copied, RoundedBuffers& b) {
  Averages a{item.data[kMaxExpAvgSq] != nullptr ? kAverages : kAverages - 1, {}, {}};
  const int64_t size = element_size(item, kExpAvg);
  for (int i = 0; i < a.count; ++i) {
    a.stored[i] = copied ? b.stored[i] : static_cast<uint8_t*>(item.data[kExpAvg + i]) + at * size;
    a.values[i] = item.state == StateKind::kComputed ? static_cast<float*>(a.stored[i]) : b.average[i];
  }
  return a;
}

// Steps the weights [begin, end) of which all are trained, where `begin` is a multiple of 128.
template <class P>
void step_rounded(const StepItem& item, int64_t begin, int64_t end) {
  const auto c = item.constants.cast<float>();
  const MaskKeys keys(item.key);
  RoundingDraw rounding(item.key);
  RoundedBuffers b;
  MaskBits bits;
  P copied_param[kBlockLanes] = {}, copied_grad[kBlockLanes] = {};
  int64_t whole = 0;  // blocks that the other loop takes
  if (item.state == StateKind::kCodes && !item.stochastic && item.layout == nullptr && !item.data[kMaxExpAvgSq]) {
    whole = (end - begin) / kMaskBlock;
    item.masked ? update_coded<P, true>(c, item, begin, whole, rounding, keys)
                : update_coded<P, false>(c, item, begin, whole, rounding, keys);
  }
  for (int64_t at = begin + whole * kMaskBlock; at < end; at += kMaskBlock) {
    const int64_t count = kMaskBlock < end - at ? kMaskBlock : end - at, lanes = in_lanes(count);
    const bool copied = item.layout != nullptr || count < kMaskBlock;
    P* param = static_cast<P*>(item.data[kParam]) + at;
    P* grad = static_cast<P*>(item.data[kGrad]) + at;
    if (copied) {
      gather(item, kParam, at, count, copied_param);
      gather(item, kGrad, at, count, copied_grad);
      copy_averages(item, at, count, false, b);
      param = copied_param;
      grad = copied_grad;
    }
    const Averages a = averages_of(item, at, copied, b);
    fetch_ahead(param, kMaskBlock);
    fetch_ahead(grad, kMaskBlock);
    fetch_ahead(static_cast<uint8_t*>(a.stored[0]), kMaskBlock);
    fetch_ahead(static_cast<uint8_t*>(a.stored[1]), kMaskBlock);
    const uint64_t block = (item.slice.offset + static_cast<uint64_t>(at)) / kMaskBlock;
    const RoundingWords words = rounding.of(block);
    if (item.masked) draw_block(keys, block, &bits);
    decode_block(item, a, lanes, at / kMaskBlock);
    Streams<float> s{b.param, b.grad, a.values[0], a.values[1], a.values[2]};
    if constexpr (std::is_same_v<P, float>) {
      s.param = param;
      s.grad = grad;
    } else {
      for (int64_t j = 0; j < lanes; j += kLanes) {
        widen_lanes(param + j, b.param + j);
        widen_lanes(grad + j, b.grad + j);
      }
    }
    const MaskBits* mask = item.masked ? &bits : nullptr;
    a.count == kAverages ? update_floats<true>(c, s, lanes, item.keep_threshold, mask)
                         : update_floats<false>(c, s, lanes, item.keep_threshold, mask);
    encode_block(item, a, count, lanes, at / kMaskBlock, words);
    if constexpr (!std::is_same_v<P, float>) {
      if (item.stochastic) round_randomly<P>(b.param, lanes, words.param, kPlaces.of);
      narrow_all(b.param, lanes, param);
    }
    if (!copied) continue;
    scatter(item, kParam, at, count, copied_param);
    copy_averages(item, at, count, true, b);
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
