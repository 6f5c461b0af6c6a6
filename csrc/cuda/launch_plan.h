// Which kernels a step on a GPU launches, with which arguments. Plain C++, without CUDA.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/step_table.h"

namespace childtune {

// Why the kernels cannot step a parameter, so that another backend must. kNotRounded: it is a RoundedItem's, but in
// double precision, or no single run that begins at a mask block.
enum class Refusal { kNone, kStrided, kMisaligned, kTooLarge, kNotRounded };

Refusal refusal(const StepItem& item);

// Which weights of a parameter are trained: all, those that a random mask keeps, or a child network.
enum class Trained : uint8_t { kAll, kMasked, kChild };
constexpr int kTrained = 3;

// How state and weights are stored: without rounding but to the weights' nearest, where kernels differ by amsgrad; or
// rounded in other ways (RoundedItem), where one kernel serves every kind of state, with amsgrad and without.
enum class Storage : uint8_t { kPlain, kAmsgrad, kRounded };
constexpr int kStorages = 3;

// What a kernel is compiled for.
struct Kind {
  DType dtype;  // not kFloat64 with kRounded
  Trained trained;
  Storage storage;
  bool large;  // its table is of kLargeArguments
};
constexpr int kKinds = (kDTypes * kStorages - 1) * kTrained * 2;

int kind_number(const Kind& kind);  // below kKinds
Kind kind_of_number(int number);
std::string kernel_name(const Kind& kind);  // as cuda/kernels.cu names it

struct Launch {
  Kind kind;
  uint32_t blocks;  // of kThreads threads
};

// The launches of a step on one device, in any order: no two touch the same element. They are planned anew for each
// step; their memory is kept.
class LaunchPlan {
 public:
  // `large_arguments`: device code and driver know the large arguments of CUDA 12.1.
  explicit LaunchPlan(bool large_arguments) : large_arguments_(large_arguments) {}

  // Returns false, and plans no launch, if an item is refused. `constants` and `found_inf` are as in TableHeader.
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
  std::vector<Argument> arguments_;  // at least as many as launches
};

}  // namespace childtune
