// A GPU in loops: calls the functions of csrc/cuda for every block, warp and lane of a plan's launches.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "cuda/child_kernel.h"
#include "cuda/device_plan.h"
#include "cuda/launch_plan.h"
#include "cuda/norm_kernel.h"
#include "cuda/rounded_child_kernel.h"
#include "cuda/rounded_kernel.h"
#include "cuda/select_kernel.h"
#include "cuda/squares_kernel.h"
#include "cuda/step_kernel.h"

namespace childtune {

// Does what GpuWarp (cuda/warp.h) does, in loops over the lanes. Lanes need what others have, so each phase ends before
// the next begins.
struct EmulatedWarp {
  template <class Tile>
  void run(const Tile& tile) const {
    typename Tile::Loaded loaded[kWarp];
    uint32_t drawn[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane) loaded[lane] = tile.load(lane);
    for (int lane = 0; Tile::kDraws && lane < kWarp; ++lane) drawn[lane] = tile.draw(lane);
    for (int lane = 0; lane < kWarp; ++lane) tile.update(lane, kept(drawn, lane), loaded[lane]);
  }

  static Kept kept(const uint32_t* drawn, int lane) {
    Kept kept{};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        kept.of[half] |= (drawn[kWarp / 2 * half + 4 * (lane % 4) + i] >> (lane / 4) & 1) << (8 * i);
      }
    }
    return kept;
  }

  template <class Step>
  void run(const Step& step, SlotPlaces& places) const {
    int slots = 0;
    for (int lane = 0; lane < kWarp; ++lane) slots += count_ones(step.word(lane));
    if (!step.fits(slots)) return;
    for (int lane = 0, before = 0; lane < kWarp; ++lane) {
      step.list(lane, step.word(lane), before, places);
      before += count_ones(step.word(lane));
    }
    for (int lane = kWarp - 1; step.item.decay_outside && lane >= 0; --lane) step.decay(lane);
    for (int lane = 0; lane < kWarp; ++lane) step.update(lane, slots, places);
  }

  template <class Tile>
  void run_rounded(const Tile& tile) const {
    uint32_t drawn[kWarp] = {};
    for (int lane = 0; Tile::kDraws && lane < kWarp; ++lane) drawn[lane] = tile.draw(lane);
    for (int half = 0; half < 2; ++half) {
      const RoundingWords words = tile.draw_words(kWarp / 2 * half);
      typename Tile::Loaded loaded[kWarp];
      Quad<float> quads[kWarp];
      PerAverage most{};
      for (int lane = 0; lane < kWarp; ++lane) loaded[lane] = tile.load(lane, half);
      for (int lane = kWarp - 1; lane >= 0; --lane) {
        quads[lane] = tile.update(lane, half, kept(drawn, lane).of[half], words, loaded[lane]);
        if (tile.has_codes()) raise(tile.most(lane, half, quads[lane]), &most);
      }
      for (int lane = 0; lane < kWarp; ++lane) tile.store(lane, half, most, words, quads[lane]);
    }
  }

  template <class Step>
  void run_rounded(const Step& step, SlotPlaces& places) const {
    int before[kWarp + 1] = {};
    for (int lane = 0; lane < kWarp; ++lane) before[lane + 1] = before[lane] + count_ones(step.word(lane));
    if (!step.fits(before[kWarp])) return;
    for (int lane = 0; lane < kWarp; ++lane) step.list(lane, step.word(lane), before[lane], places);
    for (int lane = kWarp - 1; step.item.decay_outside && lane >= 0; --lane) step.decay(lane);
    for (int block = 0; block < kMaskBlocks; ++block) {
      const SlotSpan slots{block, before[kMaskLanes * block], before[kMaskLanes * (block + 1)]};
      const RoundingWords words = step.draw_words(block);
      typename Step::Loaded loaded[kWarp];
      Quad<float> quads[kWarp] = {};
      PerAverage most{};
      for (int round = 0; round < 4 / kSlotRounds; ++round) {
        for (int lane = 0; lane < kWarp; ++lane) loaded[lane] = step.load(lane, slots, round, places);
        for (int lane = 0; lane < kWarp; ++lane) step.update(lane, slots, round, words, loaded[lane], quads[lane]);
      }
      for (int lane = 0; step.has_codes() && lane < kWarp; ++lane) raise(step.most(lane, slots, quads[lane]), &most);
      for (int lane = 0; lane < kWarp; ++lane) step.store(lane, slots, places, most, words, quads[lane]);
    }
  }

  static void raise(const PerAverage& of_lane, PerAverage* most) {
    for (int a = 0; a < kAverages; ++a) most->of[a] = std::max(most->of[a], of_lane.of[a]);
  }

  template <class OfLane>
  uint32_t vote(const OfLane& of_lane) const {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<uint32_t>(of_lane(lane)) << lane;
    return votes;
  }

  template <class OfLane>
  auto each(const OfLane& of_lane) const {
    std::array<decltype(of_lane(0)), kWarp> values{};
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = of_lane(lane);
    return values;
  }

  template <class Values, class OfValue>
  uint32_t vote(const Values& values, const OfValue& of_value) const {
    return vote([&](int lane) { return of_value(values[lane]); });
  }

  template <class V>
  void write(V* to, V value) const {
    *to = value;
  }

  template <class OfLane>
  void sum(const OfLane& of_lane, double* to) const {
    double values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = of_lane(lane);
    for (int half = kWarp / 2; half >= 1; half /= 2) {
      for (int lane = 0; lane < half; ++lane) values[lane] += values[lane + half];
    }
    *to = values[0];
  }
};

struct EmulatedBlock {
  template <class Function>
  void each(int64_t n, const Function& function) const {
    for (int64_t i = n - 1; i >= 0; --i) function(i);  // backwards, since no result may depend on the order
  }

  template <class V>
  void add(V* to, uint32_t n) const {
    *to += n;
  }
};

// Calls visit(block, warp) for all warps of all blocks of threads.
template <class Visit>
void for_warps(uint32_t blocks, const Visit& visit) {
  for (uint32_t block = 0; block < blocks; ++block) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) visit(block, warp);
  }
}

inline void emulate_norm_chunks(const NormTable& table, uint32_t blocks) {
  for_warps(blocks, [&](uint32_t block, int warp) { sum_chunks(table, block, warp, EmulatedWarp{}); });
}

inline void emulate_norm_tensors(const NormTable& table, uint32_t blocks) {
  for (uint32_t block = 0; block < blocks; ++block) sum_tensor(table, block, EmulatedBlock{});
}

inline void emulate_count_steps(const ConstantsTable& table, uint32_t blocks) {
  for (int64_t i = 0; i < int64_t{kThreads} * blocks; ++i) count_step(table, i);
}

inline void emulate(const DevicePlan& plan) {
  for (const NormTable& table : plan.norm_tables()) {
    emulate_norm_chunks(table, norm_blocks(table));
    emulate_norm_tensors(table, static_cast<uint32_t>(table.count));
  }
  if (!plan.norm_tables().empty()) sum_total(plan.total());
  for (const ConstantsTable& table : plan.constants_tables()) emulate_count_steps(table, constants_blocks(table));
}

inline void emulate_add_squares(const SquaresArgument& argument, uint32_t blocks) {
  for (uint32_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) add_squares(argument, block, thread);
  }
}

inline void emulate_count_digits(const ScoreTable& table, uint32_t blocks) {
  uint32_t counts[kDigits];
  for (uint32_t block = 0; block < blocks; ++block) count_digits(table, block, counts, EmulatedBlock{});
}

inline void emulate_write_above(const ScoreTable& table, uint32_t blocks) {
  for_warps(blocks, [&](uint32_t block, int warp) { write_above(table, block, warp, EmulatedWarp{}); });
}

inline void emulate_add_ties(const ScoreTable& table, uint32_t blocks) {
  for_warps(blocks, [&](uint32_t block, int warp) { add_ties(table, block, warp, EmulatedWarp{}); });
}

template <class P, bool kMasked, bool kAmsgrad, class T, int kBytes>
void emulate_kernel(const Kind&, const StepTable<T, TableItem, kBytes>& table, uint32_t blocks) {
  for_warps(blocks,
            [&](uint32_t block, int warp) { step_warp<P, kMasked, kAmsgrad>(table, block, warp, EmulatedWarp{}); });
}

template <class P, bool kMasked, bool kAmsgrad, class T, int kBytes>
void emulate_kernel(const Kind&, const StepTable<T, ChildItem, kBytes>& table, uint32_t blocks) {
  SlotPlaces places;
  for_warps(blocks, [&](uint32_t block, int warp) {
    step_child_warp<P, kAmsgrad>(table, block, warp, places, EmulatedWarp{});
  });
}

template <class P, bool kMasked, bool kAmsgrad, int kBytes>
void emulate_kernel(const Kind& kind, const StepTable<float, RoundedItem, kBytes>& table, uint32_t blocks) {
  SlotPlaces places;
  for_warps(blocks, [&](uint32_t block, int warp) {
    kind.trained == Trained::kChild ? step_rounded_child_warp<P>(table, block, warp, places, EmulatedWarp{})
                                    : step_rounded_warp<P, kMasked>(table, block, warp, EmulatedWarp{});
  });
}

// Calls visit(table, P{}) with the table's type and the type of parameters.
template <class Visit>
void visit_table(const Kind& kind, const void* argument, Visit visit) {
  const auto of_items = [&](auto param, auto item) {
    using T = typename ComputeType<decltype(param)>::type;
    using Item = decltype(item);
    kind.large ? visit(*static_cast<const StepTable<T, Item, kLargeArguments>*>(argument), param)
               : visit(*static_cast<const StepTable<T, Item, kSmallArguments>*>(argument), param);
  };
  const auto sized = [&](auto param) {
    if constexpr (sizeof(param) < sizeof(double)) {
      if (kind.storage == Storage::kRounded) return of_items(param, RoundedItem{});
    }
    kind.trained == Trained::kChild ? of_items(param, ChildItem{}) : of_items(param, TableItem{});
  };
  switch (kind.dtype) {
    case DType::kFloat32:
      return sized(float{});
    case DType::kFloat64:
      return sized(double{});
    case DType::kBFloat16:
      return sized(BFloat16{});
    case DType::kFloat16:
      return sized(Float16{});
  }
}

inline void emulate(const Launch& launch, const void* argument) {
  visit_table(launch.kind, argument, [&](const auto& table, auto param) {
    using P = decltype(param);
    const Kind& kind = launch.kind;
    if (kind.trained == Trained::kMasked) {
      kind.storage == Storage::kAmsgrad ? emulate_kernel<P, true, true>(kind, table, launch.blocks)
                                        : emulate_kernel<P, true, false>(kind, table, launch.blocks);
    } else {
      kind.storage == Storage::kAmsgrad ? emulate_kernel<P, false, true>(kind, table, launch.blocks)
                                        : emulate_kernel<P, false, false>(kind, table, launch.blocks);
    }
  });
}

inline void emulate(const LaunchPlan& plan) {
  for (size_t i = 0; i < plan.launches().size(); ++i) emulate(plan.launches()[i], plan.argument(i));
}

}  // namespace childtune
