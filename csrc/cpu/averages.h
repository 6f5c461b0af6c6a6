// The averages of a step that rounds stochastically, and the random words for it.
#pragma once

#include "core/codes.h"
#include "core/rounding.h"
#include "core/step_item.h"
#include "cpu/isa.h"
#include "cpu/loops.h"
#include "cpu/mask_lanes.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// The words of core/rounding.h for one block after the other; sixteen are drawn at a time, as a block's mask is.
class RoundingDraw {
 public:
  explicit RoundingDraw(const MaskKey& key) : keys_(key, kRoundingDomain) {}

  RoundingWords of(uint64_t block) {
    if (block / kMaskCounters != drawn_) {
      drawn_ = block / kMaskCounters;
      draw_block(keys_, drawn_, &bits_);
    }
    const uint64_t j = block % kMaskCounters;
    return {bits_.word[0][j], bits_.word[1][j], bits_.word[2][j], bits_.word[3][j]};
  }

 private:
  MaskKeys keys_;
  uint64_t drawn_ = ~uint64_t{0};
  MaskBits bits_;
};

// The averages of a step, exp_avg first. `stored` is where they lie as the state has them, `values` as floats: the same
// place if the state is of floats.
struct Averages {
  int count;  // of arrays: two, or three with amsgrad
  void* stored[kAverages];
  float* values[kAverages];
};

// Makes the first `count` values such as codes can hold.
CHILDTUNE_OUT_OF_LINE void sanitize_block(const Averages& a, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    float none = 0.0f;
    sanitize(a.values[0][j], a.values[1][j], a.count == kAverages ? a.values[2][j] : none);
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
