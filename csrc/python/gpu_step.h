// The step on a GPU, as Python calls it: StepItems, a plan of launches, and the CUDA driver. Included by bindings.cpp
// only, as step_items.h is.
#pragma once

#include <string>
#include <vector>

#include "cuda/driver_api.h"
#include "cuda/launch_plan.h"
#include "python/step_items.h"

namespace childtune {
namespace {

constexpr int kLargeArgumentsSince = 12010;  // the driver's version, CUDA 12.1

std::vector<std::string> kernel_names() {
  std::vector<std::string> names(kKinds);
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (int options = 0; options < kKinds / 4; ++options) {
      const Kind kind{dtype, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0};
      names[kind_number(kind)] = kernel_name(kind);
    }
  }
  return names;
}

// The kernels of one GPU, loaded from device code for it.
class GpuKernels {
 public:
  GpuKernels(int device, const py::bytes& image)
      : device_(device),
        kernels_(device, image, kernel_names()),
        large_arguments_(cuda_driver_version() >= kLargeArgumentsSince &&
                         kernels_.has(kind_number({DType::kFloat32, false, false, true}))) {
    if (!kernels_.has(0)) throw CudaError("the device code has no kernels of childtune_fast");
  }

  // Steps parameters on that GPU, whose step counts are on the CPU. `stream` is torch's current one there, as a number:
  // the one address that a caller passes, and only the driver looks at it.
  void step(const py::list& groups, uintptr_t stream) {
    Workspace& w = workspace();
    for (const py::handle& group : groups) add_group(group, device_, &w);
    w.place_layouts();
    thread_local LaunchPlan small_plan(false), large_plan(true);  // kept, as the workspace is
    LaunchPlan& plan = large_arguments_ ? large_plan : small_plan;
    if (!plan.build(w.items, nullptr, nullptr)) refuse("on a GPU every tensor must be contiguous and its own");
    const py::gil_scoped_release no_gil;
    for (size_t i = 0; i < plan.launches().size(); ++i) {
      const Launch& launch = plan.launches()[i];
      kernels_.launch(kind_number(launch.kind), plan.argument(i), launch.blocks, kThreads,
                      reinterpret_cast<void*>(stream));
    }
    write_steps(w);
  }

 private:
  int device_;
  CudaKernels kernels_;
  bool large_arguments_;
};

}  // namespace
}  // namespace childtune
