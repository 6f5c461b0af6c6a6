// Radix select on a GPU, as cuda's part of csrc/cpu/selection.cpp: functions for host and device.
//
// A score's key (core/score_key.h) has 32 bits: three passes count them, 11, 11 and 10 at a time, the upper ones first,
// in histograms small enough for memory that a block of threads shares. Between passes the host adds up the devices'
// histograms and finds the digit of the k-th key. A fourth pass writes the bits of the keys above that one, and
// counts those that equal it in each block of 1024 scores; from these counts the host knows how many of each block's
// are wanted, and a fifth pass, which leaves most blocks alone, adds the first of them.
#pragma once

#include "core/packed_mask.h"
#include "core/score_key.h"
#include "cuda/device_constants.h"

namespace childtune {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kChunkBlocks = 32;  // blocks of the mask that a block of threads takes
constexpr int64_t kChunkScores = kChunkBlocks * kRankBlock;

struct ScoreItem {
  const float* scores;  // contiguous
  uint32_t* bits;       // of kRankBlock each
  int64_t numel;        // not 0
  int64_t first_chunk;  // in the table
};

// The argument of the kernels `count_digits`, `write_above` and `add_ties`, by value. All pointers are the device's.
struct ScoreTable {
  static constexpr int kItems = (kSmallArguments - 64) / int{sizeof(ScoreItem)};

  int64_t* counts;   // count_digits: of all keys so far, by digit
  uint8_t* nan;      // count_digits: becomes 1 if a score is NaN
  int32_t* ties;     // of each mask block of the table's chunks: write_above counts, add_ties takes so many
  uint32_t flip;     // score_key's
  uint32_t wanted;   // count_digits: the digits before this one, of keys that count. Else: the k-th key
  int shift;         // count_digits: of the digit in the key
  int wanted_shift;  // count_digits: of `wanted`, where the digit ends; 32: every key counts
  int64_t count;
  ScoreItem items[kItems];
};
static_assert(sizeof(ScoreTable) <= kSmallArguments, "an argument's limit");

CHILDTUNE_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunkScores - 1) / kChunkScores; }

// What block `number` does in `count_digits`. `counts` is shared by its threads. `Block` calls a function with 0 ..
// n-1, in any order, and waits; and adds to what others may be adding to.
template <class Block>
CHILDTUNE_INLINE void count_digits(const ScoreTable& table, uint32_t number, uint32_t* counts, const Block& block) {
  const ScoreItem& item = table.items[item_of_chunk(table, number)];
  const int64_t begin = (number - item.first_chunk) * kChunkScores, left = item.numel - begin;
  const uint32_t mask = (1u << (table.wanted_shift - table.shift)) - 1;
  block.each(kDigits, [&](int64_t digit) { counts[digit] = 0; });
  block.each(left < kChunkScores ? left : kChunkScores, [&](int64_t i) {
    const float score = item.scores[begin + i];
    if (nan_bit(score) >> 31 != 0) *table.nan = 1;
    const uint32_t key = score_key(score, table.flip);
    const bool counts_here = table.wanted_shift == 32 || key >> table.wanted_shift == table.wanted;
    if (counts_here) block.add(&counts[key >> table.shift & mask], 1);
  });
  block.each(kDigits, [&](int64_t digit) {
    if (counts[digit] != 0) block.add(&table.counts[digit], counts[digit]);
  });
}

// The scores that a warp takes: those of one block of the mask.
struct ScoreBlock {
  const float* scores;
  uint32_t* bits;
  int64_t numel;  // left from here on; may be more than the block's
  int32_t* ties;
};

// Calls visit(ScoreBlock) for the blocks of warp `warp_number` of block `number`.
template <class Visit>
CHILDTUNE_INLINE void visit_blocks(const ScoreTable& table, uint32_t number, int warp_number, const Visit& visit) {
  const ScoreItem& item = table.items[item_of_chunk(table, number)];
  for (int i = warp_number; i < kChunkBlocks; i += kThreads / kWarp) {
    const int64_t begin = (number - item.first_chunk) * kChunkScores + i * kRankBlock;
    if (begin >= item.numel) return;
    visit(ScoreBlock{item.scores + begin, item.bits + begin / 32, item.numel - begin,
                     table.ties + int64_t{number} * kChunkBlocks + i});
  }
}

// What a warp does in `write_above`. `Warp` votes on a function of the lane, and lets one lane write.
template <class Warp>
CHILDTUNE_INLINE void write_above(const ScoreTable& table, uint32_t number, int warp_number, const Warp& warp) {
  visit_blocks(table, number, warp_number, [&](const ScoreBlock& block) {
    int ties = 0;
    CHILDTUNE_UNROLLED
    for (int word = 0; word < kRankBlock / 32; ++word) {
      const auto key_is = [&](int lane, bool above) {
        const int at = 32 * word + lane;
        if (at >= block.numel) return false;
        const uint32_t key = score_key(block.scores[at], table.flip);
        return above ? key > table.wanted : key == table.wanted;
      };
      warp.write(block.bits + word, warp.vote([&](int lane) { return key_is(lane, true); }));
      ties += count_ones(warp.vote([&](int lane) { return key_is(lane, false); }));
    }
    warp.write(block.ties, ties);
  });
}

// What a warp does in `add_ties`.
template <class Warp>
CHILDTUNE_INLINE void add_ties(const ScoreTable& table, uint32_t number, int warp_number, const Warp& warp) {
  visit_blocks(table, number, warp_number, [&](const ScoreBlock& block) {
    int left = *block.ties;
    for (int word = 0; word < kRankBlock / 32 && left > 0; ++word) {
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
