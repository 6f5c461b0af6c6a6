// The step of whole blocks whose state is in bytes: the usual case, in a loop of its own.
//
// While the averages of a block are decoded and updated, the weights of the block before are, and its averages are
// encoded: by then its roots and scales are known.
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

// The floats of one block, and how to encode its averages.
struct CodedBlock {
  alignas(64) float exp_avg[kCodeBlock], exp_avg_sq[kCodeBlock], roots[kCodeBlock];
  Encoding average, square;
};

// Where the arrays of whole blocks lie.
template <class P>
struct CodedStreams {
  P* param;
  const P* grad;
  uint8_t *averages, *squares, *average_scales, *square_scales;

  CHILDTUNE_MEMBER CodedStreams(const StepItem& item, int64_t begin)
      : param(static_cast<P*>(item.data[kParam]) + begin),
        grad(static_cast<const P*>(item.data[kGrad]) + begin),
        averages(static_cast<uint8_t*>(item.data[kExpAvg]) + begin),
        squares(static_cast<uint8_t*>(item.data[kExpAvgSq]) + begin),
        average_scales(item.scales[0] + begin / kCodeBlock),
        square_scales(item.scales[1] + begin / kCodeBlock) {}
};

// The scales by which a block is decoded.
struct Decoding {
  float average, square;
};

// The three steps of block `i`. The first one, for kLanes of its elements from number `at` on, decodes the averages,
// updates them and leaves them in `block`. `words` and `half` are the mask's.
template <class P, bool kMasked>
CHILDTUNE_INLINE void begin_coded(const AdamWConstants<float>& c, const CodedStreams<P>& s, int64_t i, int at,
                                  Decoding decoding, const uint32_t* words, int half, uint32_t keep_threshold,
                                  CodedBlock& block, LargestOfBlock& largest) {
#if defined(CHILDTUNE_AVX2) && !defined(CHILDTUNE_AVX512)
  float *exp_avg = block.exp_avg + at, *exp_avg_sq = block.exp_avg_sq + at, *roots = block.roots + at;
#else
  // Compilers keep these in registers, or, of plain code, turn no other loops into vectors. AVX2 has too few registers.
  float exp_avg[kLanes], exp_avg_sq[kLanes], roots[kLanes];
#endif
  const int64_t from = i * kCodeBlock + at;
  decode_average_lanes(s.averages + from, decoding.average, exp_avg);
  decode_square_lanes(s.squares + from, decoding.square, exp_avg_sq);
  const Streams<P> lanes{nullptr, s.grad + from, exp_avg, exp_avg_sq, nullptr};
  begin_update<P, kMasked, false>(c, lanes, 0, words, half, keep_threshold, roots);
  largest.take(exp_avg, exp_avg_sq);
#if !defined(CHILDTUNE_AVX2) || defined(CHILDTUNE_AVX512)
  memcpy(block.exp_avg + at, exp_avg, sizeof exp_avg);
  memcpy(block.exp_avg_sq + at, exp_avg_sq, sizeof exp_avg_sq);
  memcpy(block.roots + at, roots, sizeof roots);
#endif
}

// The second one finds the scales. It returns false if codes cannot hold the averages as they are.
template <class P>
CHILDTUNE_INLINE bool find_scales(const CodedStreams<P>& s, int64_t i, uint32_t most, uint32_t most_square,
                                  const RoundingWords& words, CodedBlock& block) {
  const uint32_t average = scale_byte(most), square = scale_byte(most_square);
  s.average_scales[i] = static_cast<uint8_t>(average);
  s.square_scales[i] = static_cast<uint8_t>(square);
  block.average = encoding_of(average, words.exp_avg);
  block.square = encoding_of(square, words.exp_avg_sq);
  return most <= kMostBits && most_square <= kMostBits;
}

// The last one, for kLanes elements again, updates the weights and encodes the averages.
template <class P>
CHILDTUNE_INLINE void end_weights(const AdamWConstants<float>& c, const CodedStreams<P>& s, int64_t i, int at,
                                  CodedBlock& block) {
  const Streams<P> lanes{s.param + i * kCodeBlock + at, nullptr, block.exp_avg + at, block.exp_avg_sq + at, nullptr};
  end_update<P>(c, lanes, 0, block.roots + at);
}

template <class P>
CHILDTUNE_INLINE void end_averages(const CodedStreams<P>& s, int64_t i, int at, const CodedBlock& block) {
  const int64_t to = i * kCodeBlock + at;
  encode_average_lanes(block.exp_avg + at, block.average, kPlaces.of + at, s.averages + to);
  encode_square_lanes(block.exp_avg_sq + at, block.square, kPlaces.of + at, s.squares + to);
}

// Takes the second and the last step of a block whose averages codes cannot hold.
template <class P>
CHILDTUNE_OUT_OF_LINE void end_sanitized(const AdamWConstants<float>& c, const CodedStreams<P>& s, int64_t i,
                                         const RoundingWords& words, CodedBlock& block) {
  for (int at = 0; at < kCodeBlock; at += kLanes) end_weights(c, s, i, at, block);
  sanitize_block({2, {}, {block.exp_avg, block.exp_avg_sq}}, kCodeBlock);
  find_scales(s, i, largest_bits(block.exp_avg, kCodeBlock, kCodeBlock),
              largest_bits(block.exp_avg_sq, kCodeBlock, kCodeBlock), words, block);
  for (int at = 0; at < kCodeBlock; at += kLanes) end_averages(s, i, at, block);
}

// Updates `blocks` whole blocks, the first of which is mask block `first`, as far as the first one whose averages codes
// cannot hold. Returns how many those are.
template <class P, bool kMasked>
CHILDTUNE_OUT_OF_LINE int64_t update_coded_blocks(const AdamWConstants<float>& constants,
                                                  const CodedStreams<P>& streams, uint64_t first, int64_t blocks,
                                                  uint32_t keep_threshold, RoundingDraw& rounding,
                                                  const MaskKeys& keys) {
  const AdamWConstants<float> c = constants;  // local copies, so that the compiler knows that no store changes them
  const CodedStreams<P> s = streams;
  MaskBits bits;
  CodedBlock pair[2];
  for (int64_t i = 0; i < blocks; ++i) {
    CodedBlock &now = pair[i % 2], &last = pair[(i + 1) % 2];
    const Decoding decoding{scale_of(s.average_scales[i]), scale_of(s.square_scales[i])};
    LargestOfBlock largest;
    largest.begin();
    if (kMasked) draw_block(keys, first + static_cast<uint64_t>(i), &bits);
    fetch_ahead(s.averages + i * kCodeBlock, kCodeBlock);
    fetch_ahead(s.squares + i * kCodeBlock, kCodeBlock);
    for (int at = 0; at < kCodeBlock; at += 2 * kLanes) {  // the two halves of a word, so that the shift is a constant
      const uint32_t* words = kMasked ? bits.word[at / (2 * kLanes)] : nullptr;
      fetch_ahead(s.param + i * kCodeBlock + at, 2 * kLanes);
      fetch_ahead(s.grad + i * kCodeBlock + at, 2 * kLanes);
      const auto part = [&](int from, int half) CHILDTUNE_LAMBDA {
        begin_coded<P, kMasked>(c, s, i, from, decoding, words, half, keep_threshold, now, largest);
        if (i == 0) return;
        end_weights(c, s, i - 1, from, last);
        end_averages(s, i - 1, from, last);
      };
      part(at, 0);
      part(at + kLanes, 1);
    }
    const RoundingWords words = rounding.of(first + static_cast<uint64_t>(i));
    if (!find_scales(s, i, largest.average(now.exp_avg), largest.square(now.exp_avg_sq), words, now)) {
      end_sanitized(constants, streams, i, words, now);
      return i + 1;
    }
  }
  for (int at = 0; at < kCodeBlock; at += kLanes) {
    end_weights(c, s, blocks - 1, at, pair[(blocks + 1) % 2]);
    end_averages(s, blocks - 1, at, pair[(blocks + 1) % 2]);
  }
  return blocks;
}

// Updates `blocks` whole blocks from element `begin` on, a multiple of 128.
template <class P, bool kMasked>
CHILDTUNE_INLINE void update_coded(const AdamWConstants<float>& c, const StepItem& item, int64_t begin, int64_t blocks,
                                   RoundingDraw& rounding, const MaskKeys& keys) {
  while (blocks > 0) {
    const uint64_t first = (item.slice.offset + static_cast<uint64_t>(begin)) / kCodeBlock;
    const int64_t done = update_coded_blocks<P, kMasked>(c, CodedStreams<P>(item, begin), first, blocks,
                                                         item.keep_threshold, rounding, keys);
    begin += done * kCodeBlock;
    blocks -= done;
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
