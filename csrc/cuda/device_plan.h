// What a step launches before its own kernels where the GPU counts the steps: the gradients' norm, if a group clips,
// and the constants. Plain C++, as cuda/launch_plan.h.
#pragma once

#include <vector>

#include "cuda/norm_kernel.h"

namespace childtune {

// What is on the device; either may be nullptr. See ConstantsTable.
struct DeviceScaler {
  const float* grad_scale;
  const float* found_inf;
};

class DevicePlan {
 public:
  // Takes the parameters of a step, whose `counter` and `group` are set, and the groups. Returns the bytes of the
  // device's memory that the step needs, aligned as a double, until it is done.
  int64_t build(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups, const DeviceScaler& scaler);

  // Says where that memory is.
  void place(void* memory);

  const DeviceConstants* constants() const { return constants_; }
  // Launched in this order: each norm table twice, by norm_chunks and norm_tensors; total; each constants table.
  const std::vector<NormTable>& norm_tables() const { return norm_tables_; }
  const NormTotal& total() const { return total_; }  // if there are norm tables
  const std::vector<ConstantsTable>& constants_tables() const { return constants_tables_; }

 private:
  void add_norm(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups);
  void add_constants(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups,
                     const DeviceScaler& scaler);

  std::vector<ConstantsTable> constants_tables_;  // all of this is kept, so that a step allocates nothing
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
