// A GPU in loops: the functions of csrc/cuda for every block, warp and lane of a plan's launches.
#pragma once

#include <cstring>

#include "cuda/device_plan.h"
#include "cuda/launch_plan.h"
#include "cuda/step_kernel.h"

namespace childtune {

// cuda/warp.h in loops over the lanes. A vote needs every lane's bits, so each phase ends before the next begins.
struct EmulatedWarp {
  template <class Tile>
  void run(const Tile& tile) const {
    typename Tile::Loaded loaded[kWarp];
    uint32_t votes[8] = {};
    for (int lane = 0; lane < kWarp; ++lane) loaded[lane] = tile.load(lane);
    for (int lane = 0; Tile::kDraws && lane < kWarp; ++lane) {
      const uint32_t bits = tile.draw(lane);
      for (int k = 0; k < 8; ++k) votes[k] |= (bits >> k & 1) << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) tile.update(lane, votes[lane / 4], loaded[lane]);
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
    for (int64_t i = n - 1; i >= 0; --i) function(i);  // the order must not matter
  }
};

inline void emulate_norm_chunks(const NormTable& table, uint32_t blocks) {
  for (uint32_t block = 0; block < blocks; ++block) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum_chunks(table, block, warp, EmulatedWarp{});
  }
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

template <class P, bool kMasked, bool kAmsgrad, class Table>
void emulate_kernel(const Table& table, uint32_t blocks) {
  for (uint32_t block = 0; block < blocks; ++block) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      step_warp<P, kMasked, kAmsgrad>(table, block, warp, EmulatedWarp{});
    }
  }
}

// Calls visit(table, P{}) with the table's type and the type of parameters.
template <class Visit>
void visit_table(const Kind& kind, const void* argument, Visit visit) {
  const auto sized = [&](auto param) {
    using P = decltype(param);
    using T = typename ComputeType<P>::type;
    kind.large ? visit(*static_cast<const StepTable<T, kLargeArguments>*>(argument), param)
               : visit(*static_cast<const StepTable<T, kSmallArguments>*>(argument), param);
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
    if (launch.kind.masked) {
      launch.kind.amsgrad ? emulate_kernel<P, true, true>(table, launch.blocks)
                          : emulate_kernel<P, true, false>(table, launch.blocks);
    } else {
      launch.kind.amsgrad ? emulate_kernel<P, false, true>(table, launch.blocks)
                          : emulate_kernel<P, false, false>(table, launch.blocks);
    }
  });
}

inline void emulate(const LaunchPlan& plan) {
  for (size_t i = 0; i < plan.launches().size(); ++i) emulate(plan.launches()[i], plan.argument(i));
}

}  // namespace childtune
