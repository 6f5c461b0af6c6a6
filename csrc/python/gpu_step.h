// The step on a GPU, as Python calls it: StepItems, a plan of launches, and the CUDA driver. Included by bindings.cpp
// only.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cuda/device_plan.h"
#include "cuda/driver_api.h"
#include "cuda/launch_plan.h"
#include "python/step_groups.h"
#include "python/tensor_view.h"

namespace childtune {
namespace {

constexpr int kLargeArgumentsSince = 12010;  // the driver's version for CUDA 12.1

// The kernels besides a step's: each one's constant here, and its name in cuda/kernels.cu.
#define CHILDTUNE_OTHER_KERNELS(X) \
  X(kCountSteps, "count_steps")    \
  X(kNormChunks, "norm_chunks")    \
  X(kNormTensors, "norm_tensors")  \
  X(kNormTotal, "norm_total")      \
  X(kAddSquares, "add_squares")    \
  X(kCountDigits, "count_digits")  \
  X(kWriteAbove, "write_above")    \
  X(kAddTies, "add_ties")

// The kernels' numbers: a step's kernels come first, by kind.
#define CHILDTUNE_NUMBER(number, name) number,
enum : size_t { kLastOfStep = kKinds - 1, CHILDTUNE_OTHER_KERNELS(CHILDTUNE_NUMBER) };
#undef CHILDTUNE_NUMBER

// The kernels' names, by number; empty ones for kernels of large arguments, if the driver does not know these: it then
// refuses such a kernel with an error that does not say why.
std::vector<std::string> kernel_names(bool large_arguments) {
  std::vector<std::string> names;
  for (int number = 0; number < kKinds; ++number) {
    const Kind kind = kind_of_number(number);
    names.push_back(kind.large && !large_arguments ? "" : kernel_name(kind));
  }
#define CHILDTUNE_NAME(number, name) names.emplace_back(name);
  CHILDTUNE_OTHER_KERNELS(CHILDTUNE_NAME)
#undef CHILDTUNE_NAME
  return names;
}

// The kernels of one GPU, loaded from device code for it. `stream` is the handle of torch's current stream there, as a
// number: the only address that Python passes in, and only the driver reads it.
class GpuKernels {
 public:
  GpuKernels(int device, const py::bytes& image)
      : device_(device),
        kernels_(device, image, kernel_names(cuda_driver_version() >= kLargeArgumentsSince)),
        large_arguments_(kernels_.has(kind_number({DType::kFloat32, Trained::kAll, Storage::kPlain, true}))) {
    if (!kernels_.has(0)) throw CudaError("the device code has no kernels of childtune_fast");
  }

  // Steps parameters that are on the GPU, and whose step counts are on the CPU. `checked` and `undo` are those of a
  // step on the CPU, and so is what is returned.
  uint64_t step(const py::list& groups, uintptr_t stream, uint64_t checked, const py::object& undo) {
    check_undo(undo);
    const Step step(groups, device_, Counter::kHost, checked);
    LaunchPlan& plan = plan_step(step.items(), nullptr, nullptr);
    {
      const py::gil_scoped_release no_gil;
      launch_writes({}, plan, stream);
      write_steps(step.items());
    }
    return step.taken(undo);
  }

  // Steps parameters that are on the GPU, and whose step counts are there too; clips if a group says so. The host waits
  // for nothing. `memory_of(bytes)` must return a uint8 tensor on the GPU of at least that size, which must live until
  // the GPU has done the step. `grad_scale` and `found_inf` are float32 tensors on the GPU, or None.
  uint64_t counted_step(const py::list& groups, uintptr_t stream, const py::object& memory_of,
                        const py::object& grad_scale, const py::object& found_inf, uint64_t checked,
                        const py::object& undo) {
    thread_local DevicePlan prelude;
    check_undo(undo);
    const Step step(groups, device_, Counter::kGpu, checked);
    const Workspace& w = step.items();
    const DeviceScaler scaler{scalar(grad_scale, "grad_scale"), scalar(found_inf, "found_inf")};
    const int64_t bytes = prelude.build(w.items, w.groups, scaler);
    const py::object memory = memory_of(bytes);
    prelude.place(place_of(memory, bytes));
    LaunchPlan& plan = plan_step(w, prelude.constants(), scaler.found_inf);
    {
      const py::gil_scoped_release no_gil;
      for (const NormTable& table : prelude.norm_tables()) launch(kNormChunks, &table, norm_blocks(table), stream);
      for (const NormTable& table : prelude.norm_tables())
        launch(kNormTensors, &table, static_cast<unsigned>(table.count), stream);
      if (!prelude.norm_tables().empty()) launch(kNormTotal, &prelude.total(), 1, stream);
      launch_writes(prelude.constants_tables(), plan, stream);
    }
    return step.taken(undo);
  }

  int device() const { return device_; }

  // Returns the address of `memory`, after checking that it is uint8, on the GPU, aligned, and of at least `bytes`
  // bytes.
  void* place_of(const py::object& memory, int64_t bytes) const {
    const TensorView view = view_tensor(memory.ptr());
    if (!view.is(kCodeUInt, 8) || view.device != device_ || !view.contiguous() || view.numel() < bytes ||
        reinterpret_cast<uintptr_t>(view.data) % alignof(DeviceConstants) != 0)
      refuse("memory_of must return uint8 memory of the device");
    return view.data;
  }

  void launch(size_t function, const void* argument, unsigned blocks, uintptr_t stream) const {
    kernels_.launch(function, argument, blocks, kThreads, reinterpret_cast<void*>(stream));
  }

 private:
  const float* scalar(const py::object& tensor, const char* name) const {
    if (tensor.is_none()) return nullptr;
    return static_cast<const float*>(number_on(device_, view_tensor(tensor.ptr()), name));
  }

  LaunchPlan& plan_step(const Workspace& w, const DeviceConstants* constants, const float* found_inf) const {
    thread_local LaunchPlan small_plan(false), large_plan(true);  // kept, so that a step allocates nothing
    LaunchPlan& plan = large_arguments_ ? large_plan : small_plan;
    if (!plan.build(w.items, constants, found_inf))
      refuse("on a GPU every tensor must be contiguous, and child_bits aligned to 16 bytes");
    return plan;
  }

  // Launches what writes counts, state and parameters. Its error says whether a part of that was begun.
  void launch_writes(const std::vector<ConstantsTable>& constants, const LaunchPlan& plan, uintptr_t stream) const {
    bool begun = false;
    try {
      for (const ConstantsTable& table : constants) {
        launch(kCountSteps, &table, constants_blocks(table), stream);
        begun = true;
      }
      for (size_t i = 0; i < plan.launches().size(); ++i) {
        const Launch& of_step = plan.launches()[i];
        launch(kind_number(of_step.kind), plan.argument(i), of_step.blocks, stream);
        begun = true;
      }
    } catch (CudaError& error) {
      error.begun = begun;
      throw;
    }
  }

  int device_;
  CudaKernels kernels_;
  bool large_arguments_;
};

}  // namespace
}  // namespace childtune
