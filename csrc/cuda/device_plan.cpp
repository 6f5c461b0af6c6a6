// Fills tables in order, and begins the next where one is full.
#include "cuda/device_plan.h"

#include <algorithm>

namespace childtune {

int64_t DevicePlan::build(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups,
                          const DeviceScaler& scaler) {
  norm_tables_.clear();
  constants_tables_.clear();
  tensors_ = chunks_ = 0;
  const auto clips = [](const DeviceGroup& group) { return group.clips; };
  if (std::any_of(groups.begin(), groups.end(), clips)) add_norm(items, groups);
  add_constants(items, groups, scaler);
  return constants_bytes_ + static_cast<int64_t>(sizeof(double)) * (1 + tensors_ + chunks_);
}

// Sorts the tensors by their number in the optimizer: the norm is summed in that order, as on the CPU, so that it has
// the same bits however the tensors are grouped.
void DevicePlan::add_norm(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups) {
  in_order_.clear();
  for (const StepItem& item : items) {
    if (item.numel > 0) in_order_.push_back(&item);
  }
  std::sort(in_order_.begin(), in_order_.end(),
            [](const StepItem* a, const StepItem* b) { return a->key.param_index < b->key.param_index; });
  for (const StepItem* item : in_order_) {
    if (norm_tables_.empty() || norm_tables_.back().count == NormTable::kItems) norm_tables_.emplace_back();
    NormTable& table = norm_tables_.back();
    const uint8_t* bits = groups[item->group].child_norm ? item->child.bits : nullptr;
    table.items[table.count++] = {item->data[kGrad], bits, item->numel, table.chunks, item->dtype};
    table.chunks += norm_chunks_of(item->numel);
    chunks_ += norm_chunks_of(item->numel);
    ++tensors_;
  }
}

// Begins a table also where one has no room for another group. Items come group by group.
void DevicePlan::add_constants(const std::vector<StepItem>& items, const std::vector<DeviceGroup>& groups,
                               const DeviceScaler& scaler) {
  uint32_t last_index = 0, first_group = 0;
  for (const StepItem& item : items) {
    last_index = std::max(last_index, item.key.param_index);
    const bool fits = !constants_tables_.empty() && constants_tables_.back().count < ConstantsTable::kItems &&
                      item.group - first_group < ConstantsTable::kGroups;
    if (!fits) {
      first_group = item.group;
      constants_tables_.emplace_back();
      constants_tables_.back().grad_scale = scaler.grad_scale;
      constants_tables_.back().found_inf = scaler.found_inf;
    }
    ConstantsTable& table = constants_tables_.back();
    table.groups[item.group - first_group] = groups[item.group];
    table.items[table.count++] = {item.counter, item.key.param_index, item.group - first_group};
  }
  constants_bytes_ = items.empty() ? 0 : static_cast<int64_t>(sizeof(DeviceConstants)) * (int64_t{last_index} + 1);
}

void DevicePlan::place(void* memory) {
  constants_ = static_cast<DeviceConstants*>(memory);
  auto* sums = reinterpret_cast<double*>(static_cast<char*>(memory) + constants_bytes_);
  total_ = {sums + 1, tensors_, sums};
  double* tensor_sums = sums + 1;
  double* chunk_sums = tensor_sums + tensors_;
  for (NormTable& table : norm_tables_) {
    table.tensor_sums = tensor_sums;
    table.chunk_sums = chunk_sums;
    tensor_sums += table.count;
    chunk_sums += table.chunks;
  }
  for (ConstantsTable& table : constants_tables_) {
    table.squares = total_.total;
    table.constants = constants_;
  }
}

}  // namespace childtune
