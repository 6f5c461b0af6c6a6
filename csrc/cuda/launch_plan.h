// Which kernels a step on a GPU launches, with which arguments. Plain C++: it knows nothing of CUDA.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/step_table.h"

namespace childtune {

// Why the kernels cannot take a parameter, which then needs another backend.
enum class Refusal { kNone, kStrided, kMisaligned, kTooLarge };

Refusal refusal(const StepItem& item);

// Which weights of a parameter are trained: all, those that a random mask keeps, or a child network.
enum class Trained : uint8_t { kAll, kMasked, kChild };

// What a kernel is compiled for.
struct Kind {
  DType dtype;
  Trained trained;
  bool amsgrad, large;  // large: its table is of kLargeArguments
};
constexpr int kKinds = 48;

int kind_number(const Kind& kind);  // below kKinds
Kind kind_of_number(int number);
std::string kernel_name(const Kind& kind);  // in kernels.cu

struct Launch {
  Kind kind;
  uint32_t blocks;  // of kThreads threads
};

// The launches of a step on one device, in any order; no two touch the same element. Made anew for each step, in memory
// that is kept.
class LaunchPlan {
 public:
  // Large arguments: CUDA 12.1, and a driver for it.
  explicit LaunchPlan(bool large_arguments) : large_arguments_(large_arguments) {}

  // Returns whether it could: if an item is refused, there are no launches. The pointers are those of TableHeader.
  bool build(const std::vector<StepItem>& items, const DeviceConstants* constants, const float* found_inf);

  const std::vector<Launch>& launches() const { return launches_; }
  // The kernel's only argument, a StepTable.
  const void* argument(size_t launch) const { return arguments_[launch].bytes; }

 private:
  struct alignas(16) Argument {
    unsigned char bytes[kLargeArguments];
  };

  template <class T, class Item>
  void add_kind(Kind kind, int64_t count, const std::vector<StepItem>& items, const TableHeader& header);
  template <class Table>
  void add_items(const Kind& kind, const std::vector<StepItem>& items, const TableHeader& header);
  template <class Table>
  Table* start_launch(const Kind& kind, const TableHeader& header);

  bool large_arguments_;
  std::vector<Launch> launches_;
  std::vector<Argument> arguments_;  // at least as many
};

}  // namespace childtune
