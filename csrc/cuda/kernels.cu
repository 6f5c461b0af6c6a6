// The kernels of the step: one for each dtype, with and without mask and amsgrad, for tables of either size, which
// cuda/launch_plan.cpp knows by name; and those of constants and norm, which cuda/device_plan.cpp does. nvcc and NVRTC
// compile this file alike.
#include "cuda/norm_kernel.h"
#include "cuda/step_kernel.h"
#include "cuda/warp.h"

// Blocks that a multiprocessor has registers for, at least: as many as no compiler spills for. Left to themselves, some
// spill to have room for more.
#define CHILDTUNE_BLOCKS(P, kMasked, kAmsgrad) \
  (sizeof(childtune::ComputeType<P>::type) == 8 ? 1 : (kMasked) && (kAmsgrad) ? 2 : 3)

#define CHILDTUNE_KERNEL(name, P, kMasked, kAmsgrad, kBytes)                                                \
  extern "C" __global__ void __launch_bounds__(childtune::kThreads, CHILDTUNE_BLOCKS(P, kMasked, kAmsgrad)) \
      name(__grid_constant__ const childtune::StepTable<childtune::ComputeType<P>::type, kBytes> table) {   \
    const childtune::GpuWarp warp{static_cast<int>(threadIdx.x % childtune::kWarp)};                        \
    const int number = static_cast<int>(threadIdx.x / childtune::kWarp);                                    \
    childtune::step_warp<P, kMasked, kAmsgrad>(table, blockIdx.x, number, warp);                            \
  }

// Large arguments came with CUDA 12.1.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define CHILDTUNE_LARGE CHILDTUNE_KERNEL
#else
#define CHILDTUNE_LARGE(name, P, kMasked, kAmsgrad, kBytes)
#endif

#define CHILDTUNE_SIZES(name, P, kMasked, kAmsgrad)                                \
  CHILDTUNE_KERNEL(name##_small, P, kMasked, kAmsgrad, childtune::kSmallArguments) \
  CHILDTUNE_LARGE(name##_large, P, kMasked, kAmsgrad, childtune::kLargeArguments)

#define CHILDTUNE_KINDS(name, P)                  \
  CHILDTUNE_SIZES(name, P, false, false)          \
  CHILDTUNE_SIZES(name##_amsgrad, P, false, true) \
  CHILDTUNE_SIZES(name##_masked, P, true, false)  \
  CHILDTUNE_SIZES(name##_masked_amsgrad, P, true, true)

CHILDTUNE_KINDS(step_float32, float)
CHILDTUNE_KINDS(step_float64, double)
CHILDTUNE_KINDS(step_bfloat16, childtune::BFloat16)
CHILDTUNE_KINDS(step_float16, childtune::Float16)

extern "C" __global__ void __launch_bounds__(childtune::kThreads)
    count_steps(__grid_constant__ const childtune::ConstantsTable table) {
  childtune::count_step(table, int64_t{blockIdx.x} * childtune::kThreads + threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(childtune::kThreads)
    norm_chunks(__grid_constant__ const childtune::NormTable table) {
  const childtune::GpuWarp warp{static_cast<int>(threadIdx.x % childtune::kWarp)};
  childtune::sum_chunks(table, blockIdx.x, static_cast<int>(threadIdx.x / childtune::kWarp), warp);
}

extern "C" __global__ void __launch_bounds__(childtune::kThreads)
    norm_tensors(__grid_constant__ const childtune::NormTable table) {
  childtune::sum_tensor(table, blockIdx.x, childtune::GpuBlock{});
}

extern "C" __global__ void norm_total(__grid_constant__ const childtune::NormTotal norm) {
  if (threadIdx.x == 0) childtune::sum_total(norm);
}
