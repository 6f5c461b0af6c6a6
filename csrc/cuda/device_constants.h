// The constants of a step, computed on the GPU. The step counts are there, and a learning rate, a GradScaler's scale
// and the gradients' norm may be: so the host need not wait for them, and a CUDA graph that replays the step goes on
// counting.
#pragma once

#include "core/step_item.h"
#include "cuda/launch.h"

namespace childtune {

// What the parameters of a group share.
struct DeviceGroup {
  HyperParams hyper;  // grad_factor: without a GradScaler's scale and the clip factor, which are read on the device
  const void* lr;     // on the device, float or double, instead of hyper.lr; nullptr: hyper.lr is used
  bool lr_is_double;
  bool clips;
  bool child_norm;  // only the child network's gradient counts in the norm
  double max_grad_norm;
};

struct DeviceConstants {
  AdamWConstants<double> constants;
  uint32_t step;
};

struct CountedItem {
  double* counter;
  uint32_t param_index, group;
};

// The argument of the kernel `count_steps`, by value. All pointers are the device's.
struct ConstantsTable {
  static constexpr int kGroups = 8;
  static constexpr int kItems = (kSmallArguments - 40 - kGroups * int{sizeof(DeviceGroup)}) / int{sizeof(CountedItem)};

  const float* grad_scale;  // gradients are divided by it; nullptr: by nothing
  const float* found_inf;   // unless zero, the step is not taken; nullptr: zero
  const double* squares;    // the sum of the squares of all gradients; read only for groups that clip
  DeviceConstants* constants;
  int64_t count;
  DeviceGroup groups[kGroups];
  CountedItem items[kItems];
};
static_assert(sizeof(ConstantsTable) <= kSmallArguments, "an argument's limit");

// What thread `i` of a launch does: it counts a parameter's step and computes its constants, with the host's bits.
CHILDTUNE_INLINE void count_step(const ConstantsTable& table, int64_t i) {
  if (i >= table.count || (table.found_inf != nullptr && *table.found_inf != 0.0f)) return;
  const CountedItem item = table.items[i];
  const DeviceGroup& group = table.groups[item.group];
  HyperParams h = group.hyper;
  if (group.lr != nullptr) {
    h.lr = group.lr_is_double ? *static_cast<const double*>(group.lr) : double{*static_cast<const float*>(group.lr)};
  }
  if (table.grad_scale != nullptr) h.grad_factor /= double{*table.grad_scale};
  if (group.clips) h.grad_factor *= clip_factor(group.max_grad_norm, *table.squares, h.grad_factor);
  const uint64_t step = static_cast<uint64_t>(*item.counter) + 1;
  table.constants[item.param_index] = {step_constants(h, step), static_cast<uint32_t>(step)};
  *item.counter = static_cast<double>(step);
}

}  // namespace childtune
