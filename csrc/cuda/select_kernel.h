// Radix select on a GPU, with the result of cpu/select.cpp, as functions for host and device: the CPU can run them in
// loops over blocks, warps and lanes.
//
// A score's key (core/score_key.h) has 32 bits. Three passes count digits of 11, 11 and 10 bits, the upper ones first,
// in histograms that are small enough for the memory that a block of threads shares. Between passes the host adds up
// the devices' histograms and finds the digit of the k-th key. A fourth pass writes the bits of the keys above the
// k-th, and counts the ties, which are the keys that equal it, in each packed block of 1024 scores. From these counts
// the host computes how many ties of each packed block are selected. A fifth pass, which has nothing to do in most
// packed blocks, selects the first of them.
#pragma once

#include "core/packed_mask.h"
#include "core/score_key.h"
#include "cuda/launch.h"

namespace childtune {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kChunkPackedBlocks = 32;  // packed blocks that a block of threads takes
constexpr int64_t kChunkScores = kChunkPackedBlocks * kPackedBlock;
constexpr int kScoresAhead = 8;  // scores that a lane or thread loads before it writes: stores might be to the scores

struct ScoreItem {
  const float* scores;  // contiguous
  uint32_t* bits;       // mask_bytes(numel) bytes
  int64_t numel;        // not 0
  int64_t first_chunk;  // in the table
};

// The argument of the kernels `count_digits`, `write_above` and `add_ties`, by value. All pointers are the device's.
struct ScoreTable {
  static constexpr int kItems = (kSmallArguments - 64) / int{sizeof(ScoreItem)};

  int64_t* counts;   // count_digits: how many keys have each digit; added to
  uint8_t* nan;      // count_digits: becomes 1 if a score is NaN
  int32_t* ties;     // of each packed block of the table's chunks: write_above counts them, add_ties selects so many
  uint32_t flip;     // as in score_key
  uint32_t wanted;   // count_digits: the upper bits of the keys that count. Other kernels: the k-th key
  int shift;         // count_digits: where the digit begins in the key
  int wanted_shift;  // count_digits: where the digit ends, and `wanted` begins; 32: every key counts
  int64_t count;
  ScoreItem items[kItems];
};
static_assert(sizeof(ScoreTable) <= kSmallArguments, "an argument's limit");

CHILDTUNE_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunkScores - 1) / kChunkScores; }

// What the block of threads `number` does in `count_digits`. `counts` is memory that its threads share. `Block` calls a
// function with 0 .. n-1, in any order, and waits for all calls; and it adds to numbers that other threads may be
// adding to.
template <class Block>
CHILDTUNE_INLINE void count_digits(const ScoreTable& table, uint32_t number, uint32_t* counts, const Block& block) {
  const ScoreItem& item = table.items[item_of_chunk(table, number)];
  const int64_t begin = (number - item.first_chunk) * kChunkScores;
  constexpr int64_t kApart = kChunkScores / kScoresAhead;
  const uint32_t mask = (1u << (table.wanted_shift - table.shift)) - 1;
  block.each(kDigits, [&](int64_t digit) { counts[digit] = 0; });
  block.each(kApart, [&](int64_t i) {
    float scores[kScoresAhead] = {};
    CHILDTUNE_UNROLLED
    for (int k = 0; k < kScoresAhead; ++k) {
      const int64_t at = begin + kApart * k + i;
      if (at < item.numel) scores[k] = item.scores[at];
    }
    CHILDTUNE_UNROLLED
    for (int k = 0; k < kScoresAhead; ++k) {
      if (begin + kApart * k + i >= item.numel) continue;
      if (nan_bit(scores[k]) >> 31 != 0) *table.nan = 1;
      const uint32_t key = score_key(scores[k], table.flip);
      const bool counts_here = table.wanted_shift == 32 || key >> table.wanted_shift == table.wanted;
      if (counts_here) block.add(&counts[key >> table.shift & mask], 1);
    }
  });
  block.each(kDigits, [&](int64_t digit) {
    if (counts[digit] != 0) block.add(&table.counts[digit], counts[digit]);
  });
}

// What a warp takes at a time: the scores and the bits of one packed block.
struct ScoredPackedBlock {
  const float* scores;
  uint32_t* bits;
  int64_t numel;  // scores from here to the end of the tensor; may be more than kPackedBlock
  int32_t* ties;
};

// Calls visit(ScoredPackedBlock) for the packed blocks of warp `warp_number` of the block of threads `number`.
template <class Visit>
CHILDTUNE_INLINE void visit_packed_blocks(const ScoreTable& table, uint32_t number, int warp_number,
                                          const Visit& visit) {
  const ScoreItem& item = table.items[item_of_chunk(table, number)];
  for (int i = warp_number; i < kChunkPackedBlocks; i += kThreads / kWarp) {
    const int64_t begin = (number - item.first_chunk) * kChunkScores + i * kPackedBlock;
    if (begin >= item.numel) return;
    visit(ScoredPackedBlock{item.scores + begin, item.bits + begin / 32, item.numel - begin,
                            table.ties + int64_t{number} * kChunkPackedBlocks + i});
  }
}

// A lane's scores of words that follow each other.
struct LaneScores {
  float of[kScoresAhead];
  int left;  // how many scores there are from the first of these on

  CHILDTUNE_MEMBER bool has(int i) const { return 32 * i < left; }
};

// What a warp does in `write_above`. `Warp` has a value of every lane, votes on a function of it, and lets one lane
// write.
template <class Warp>
CHILDTUNE_INLINE void write_above(const ScoreTable& table, uint32_t number, int warp_number, const Warp& warp) {
  visit_packed_blocks(table, number, warp_number, [&](const ScoredPackedBlock& block) {
    const int there = block.numel < kPackedBlock ? static_cast<int>(block.numel) : static_cast<int>(kPackedBlock);
    int ties = 0;
    for (int word = 0; word < kPackedBlock / 32; word += kScoresAhead) {
      const auto scores = warp.each([&](int lane) {
        LaneScores own{{}, there - 32 * word - lane};
        CHILDTUNE_UNROLLED
        for (int i = 0; i < kScoresAhead; ++i) {
          if (own.has(i)) own.of[i] = block.scores[32 * (word + i) + lane];
        }
        return own;
      });
      CHILDTUNE_UNROLLED
      for (int i = 0; i < kScoresAhead; ++i) {
        const auto key = [&](const LaneScores& own) { return score_key(own.of[i], table.flip); };
        const auto above = [&](const LaneScores& own) { return own.has(i) && key(own) > table.wanted; };
        const auto ties_with = [&](const LaneScores& own) { return own.has(i) && key(own) == table.wanted; };
        warp.write(block.bits + word + i, warp.vote(scores, above));
        ties += count_ones(warp.vote(scores, ties_with));
      }
    }
    warp.write(block.ties, ties);
  });
}

// What a warp does in `add_ties`.
template <class Warp>
CHILDTUNE_INLINE void add_ties(const ScoreTable& table, uint32_t number, int warp_number, const Warp& warp) {
  visit_packed_blocks(table, number, warp_number, [&](const ScoredPackedBlock& block) {
    int left = *block.ties;
    for (int word = 0; word < kPackedBlock / 32 && left > 0; ++word) {
      const uint32_t ties = warp.vote([&](int lane) {
        const int at = 32 * word + lane;
        return at < block.numel && score_key(block.scores[at], table.flip) == table.wanted;
      });
      const uint32_t first =
          warp.vote([&](int lane) { return (ties >> lane & 1) != 0 && count_ones(ties & ((1u << lane) - 1)) < left; });
      if (first != 0) warp.write(block.bits + word, block.bits[word] | first);
      left -= count_ones(first);
    }
  });
}

}  // namespace childtune
