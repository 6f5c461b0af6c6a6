// What a step launches before its own kernels where the GPU counts the steps: the gradients' norm, if a group clips,
// and the constants. Plain C++, without CUDA.
#pragma once

#include <vector>

#include "core/step_item.h"
#include "cuda/device_constants.h"
#include "cuda/norm_kernel.h"

namespace childtune {

// What a GradScaler keeps on the device: pointers as in ConstantsTable, either of which may be nullptr.
struct DeviceScaler {
  const float* grad_scale;
  const float* found_inf;
};

class DevicePlan {
 public:
  // Takes the parameters of a step, whose `counter` and `group` are set, and the groups. Returns how many bytes of the
  // device's memory, aligned as a double, the step needs until the device has done it.
  int64_t build(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups, const DeviceScaler& scaler);

  // Sets where the memory is that `build` asked for.
  void place(void* memory);

  const DeviceConstants* constants() const { return constants_; }
  // Launched in this order: each norm table twice, by norm_chunks and norm_tensors; total; each constants table.
  const std::vector<NormTable>& norm_tables() const { return norm_tables_; }
  const NormTotal& total() const { return total_; }  // set only if there are norm tables
  const std::vector<ConstantsTable>& constants_tables() const { return constants_tables_; }

 private:
  void add_norm(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups);
  void add_constants(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups,
                     const DeviceScaler& scaler);

  // All vectors are kept between steps, so that a step allocates nothing.
  std::vector<ConstantsTable> constants_tables_;
  std::vector<NormTable> norm_tables_;
  std::vector<const StepItem*> in_order_;
  NormTotal total_{};
  DeviceConstants* constants_ = nullptr;
  int64_t constants_bytes_ = 0, tensors_ = 0, chunks_ = 0;
};

inline unsigned constants_blocks(const ConstantsTable& table) {
  return static_cast<unsigned>((table.count + kThreads - 1) / kThreads);
}
inline unsigned norm_blocks(const NormTable& table) {
  return static_cast<unsigned>((table.chunks + kBlockChunks - 1) / kBlockChunks);
}

}  // namespace childtune
