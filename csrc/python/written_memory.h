// Tells whether what a step writes overlaps: a parameter that is the average of another one, say, or an expanded
// tensor. Looked at again only when the memory is another than in the last step, so that the usual step pays for a
// digest of its addresses alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/step_item.h"

namespace childtune {

// Thrown by a step whose written arrays may overlap. Nothing has been written. The step passes if it is told `digest`.
struct UnverifiedMemory {
  uint64_t digest;
};

// Where the host finds a parameter's step count: a float64 or a float32.
struct StepCounter {
  void* at;
  bool is_double;
};

inline bool is_compact(const StepItem& item, int stream) { return stream > kGrad && item.child.bits != nullptr; }

inline int64_t elements_of(const StepItem& item, int stream) {
  return is_compact(item, stream) ? item.child.count : item.numel;
}

// Calls `visit(item, stream)` for every array that a step writes and that has elements.
template <class Visit>
void for_each_written(const std::vector<StepItem>& items, Visit&& visit) {
  for (const StepItem& item : items) {
    for (const int stream : {int{kParam}, int{kExpAvg}, int{kExpAvgSq}, int{kMaxExpAvgSq}}) {
      if (item.data[stream] != nullptr && elements_of(item, stream) > 0) visit(item, stream);
    }
  }
}

// Calls `visit(address, bytes)` for the scales of every average in codes that a step writes.
template <class Visit>
void for_each_scales(const std::vector<StepItem>& items, Visit&& visit) {
  for (const StepItem& item : items) {
    if (item.numel == 0) continue;
    for (const uint8_t* scales : item.scales) {
      if (scales != nullptr) visit(reinterpret_cast<uintptr_t>(scales), (item.numel + kMaskBlock - 1) / kMaskBlock);
    }
  }
}

// Returns the strides of an array that is not contiguous; nullptr for others.
inline const int64_t* strides_of(const StepItem& item, int stream) {
  if (item.layout == nullptr || is_compact(item, stream)) return nullptr;
  return item.layout + 1 + (stream + 1) * item.layout[0];
}

// A number that is another one, but for a chance of 2^-64, if a step writes elsewhere.
inline uint64_t digest_of_written(const std::vector<StepItem>& items, const std::vector<StepCounter>& step_counters) {
  uint64_t digest = 1;
  const auto mix = [&](uint64_t value) {
    digest = (digest ^ value) * 0x9e3779b97f4a7c15u;
    digest ^= digest >> 32;
  };
  for_each_written(items, [&](const StepItem& item, int stream) {
    mix(reinterpret_cast<uintptr_t>(item.data[stream]));
    mix(static_cast<uint64_t>(elements_of(item, stream) * element_size(item, stream)));
    if (const int64_t* strides = strides_of(item, stream)) {
      const int64_t ndim = item.layout[0];
      for (int64_t d = 0; d < ndim; ++d) mix(static_cast<uint64_t>(item.layout[1 + d]));
      for (int64_t d = 0; d < ndim; ++d) mix(static_cast<uint64_t>(strides[d]));
    }
  });
  for_each_scales(items, [&](uintptr_t at, int64_t) { mix(at); });
  for (const StepItem& item : items) mix(reinterpret_cast<uintptr_t>(item.counter));
  for (const StepCounter& counter : step_counters) mix(reinterpret_cast<uintptr_t>(counter.at) + counter.is_double);
  return digest;
}

// Returns how many elements an array reaches over; 0 if two of its elements may be one: unless every stride leaps over
// all elements of the smaller strides.
inline int64_t reach(const StepItem& item, int stream) {
  const int64_t* strides = strides_of(item, stream);
  if (strides == nullptr) return elements_of(item, stream);
  const int64_t* shape = item.layout + 1;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < item.layout[0]; ++d) {
    if (shape[d] > 1) dims.emplace_back(strides[d], shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return 0;
    last += (size - 1) * stride;
  }
  return last + 1;
}

// Returns whether no two elements that a step writes share memory, as far as can be told from where each array begins
// and ends; false says nothing.
inline bool lie_apart(const std::vector<StepItem>& items, const std::vector<StepCounter>& step_counters) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;  // where an array begins and ends
  bool apart = true;
  for_each_written(items, [&](const StepItem& item, int stream) {
    const auto begin = reinterpret_cast<uintptr_t>(item.data[stream]);
    const int64_t elements = reach(item, stream);
    apart = apart && elements > 0;
    spans.emplace_back(begin, begin + static_cast<uintptr_t>(elements * element_size(item, stream)));
  });
  for_each_scales(items,
                  [&](uintptr_t at, int64_t bytes) { spans.emplace_back(at, at + static_cast<uintptr_t>(bytes)); });
  const auto add_count = [&](const void* count, uintptr_t size) {
    const auto begin = reinterpret_cast<uintptr_t>(count);
    if (count != nullptr) spans.emplace_back(begin, begin + size);
  };
  for (const StepItem& item : items) add_count(item.counter, sizeof(double));
  for (const StepCounter& counter : step_counters) {
    add_count(counter.at, counter.is_double ? sizeof(double) : sizeof(float));
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) apart = apart && spans[i - 1].second <= spans[i].first;
  return apart;
}

}  // namespace childtune
