// The step of whole blocks whose state is in bytes: the usual case, in a loop of its own.
//
// Before a block is updated, it is decoded, and the one before is encoded, whose scales have become known meanwhile.
#pragma once

#include "core/adamw.h"
#include "core/rounding.h"
#include "core/step_item.h"
#include "cpu/averages.h"
#include "cpu/code_lanes.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/loops.h"
#include "cpu/mask_lanes.h"
#include "cpu/spread.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// The floats of one block's averages, and how to encode them.
struct CodedBlock {
  alignas(64) float exp_avg[kCodeBlock], exp_avg_sq[kCodeBlock];
  Encoding average, square;
};

CHILDTUNE_INLINE void encode(const CodedBlock& block, uint8_t* averages, uint8_t* squares) {
  for (int at = 0; at < kCodeBlock; at += kLanes) {
    encode_average_lanes(block.exp_avg + at, block.average, kPlaces.of + at, averages + at);
    encode_square_lanes(block.exp_avg_sq + at, block.square, kPlaces.of + at, squares + at);
  }
}

// Finds the scales of an updated block's averages, and stores them.
CHILDTUNE_INLINE void find_scales(CodedBlock& of, const RoundingWords& words, uint8_t* average, uint8_t* square) {
  uint32_t most = largest_bits(of.exp_avg, kCodeBlock, kCodeBlock);
  uint32_t most_square = largest_bits(of.exp_avg_sq, kCodeBlock, kCodeBlock);
  if (most > kMostBits || most_square > kMostBits) {
    sanitize_block({2, {}, {of.exp_avg, of.exp_avg_sq}}, kCodeBlock);
    most = largest_bits(of.exp_avg, kCodeBlock, kCodeBlock);
    most_square = largest_bits(of.exp_avg_sq, kCodeBlock, kCodeBlock);
  }
  *average = static_cast<uint8_t>(scale_byte(most));
  *square = static_cast<uint8_t>(scale_byte(most_square));
  of.average = encoding_of(*average, words.exp_avg);
  of.square = encoding_of(*square, words.exp_avg_sq);
}

// Updates `blocks` whole blocks from element `begin` on, a multiple of 128.
template <class P, bool kMasked>
CHILDTUNE_OUT_OF_LINE void update_coded_blocks(const AdamWConstants<float>& constants, const StepItem& item,
                                               int64_t begin, int64_t blocks, RoundingDraw& rounding,
                                               const MaskKeys& keys) {
  const AdamWConstants<float> c = constants;  // a local copy, so that the compiler knows that no store changes it
  const uint32_t keep_threshold = item.keep_threshold;
  P* param = static_cast<P*>(item.data[kParam]) + begin;
  const P* grad = static_cast<const P*>(item.data[kGrad]) + begin;
  uint8_t* averages = static_cast<uint8_t*>(item.data[kExpAvg]) + begin;
  uint8_t* squares = static_cast<uint8_t*>(item.data[kExpAvgSq]) + begin;
  uint8_t* average_scales = item.scales[0] + begin / kCodeBlock;
  uint8_t* square_scales = item.scales[1] + begin / kCodeBlock;
  const uint64_t first = (item.slice.offset + static_cast<uint64_t>(begin)) / kCodeBlock;
  MaskBits bits;
  CodedBlock pair[2];
  for (int64_t i = 0; i < blocks; ++i) {
    CodedBlock& now = pair[i % 2];
    const CodedBlock& last = pair[(i + 1) % 2];
    const float average_factor = scale_of(average_scales[i]), square_factor = scale_of(square_scales[i]);
    if (kMasked) draw_block(keys, first + static_cast<uint64_t>(i), &bits);
    fetch_ahead(averages, kCodeBlock);
    fetch_ahead(squares, kCodeBlock);
    for (int at = 0; at < kCodeBlock; at += kLanes) {
      decode_average_lanes(averages + at, average_factor, now.exp_avg + at);
      decode_square_lanes(squares + at, square_factor, now.exp_avg_sq + at);
    }
    if (i > 0) encode(last, averages - kCodeBlock, squares - kCodeBlock);
    const Streams<P> s{param, grad, now.exp_avg, now.exp_avg_sq, nullptr};
    for (int at = 0; at < kCodeBlock; at += 2 * kLanes) {  // the two halves of a word, so that the shift is a constant
      const uint32_t* words = kMasked ? bits.word[at / (2 * kLanes)] : nullptr;
      fetch_ahead(param + at, 2 * kLanes);
      fetch_ahead(grad + at, 2 * kLanes);
      update_all_lanes<P, kMasked, false>(c, s, at, words, 0, keep_threshold);
      update_all_lanes<P, kMasked, false>(c, s, at + kLanes, words, 1, keep_threshold);
    }
    find_scales(now, rounding.of(first + static_cast<uint64_t>(i)), average_scales + i, square_scales + i);
    param += kCodeBlock;
    grad += kCodeBlock;
    averages += kCodeBlock;
    squares += kCodeBlock;
  }
  if (blocks > 0) encode(pair[(blocks + 1) % 2], averages - kCodeBlock, squares - kCodeBlock);
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
