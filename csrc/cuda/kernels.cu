// All kernels for a GPU. A step's kernels differ in the dtype, in which weights are trained (all, those of a random
// mask, a child network), in amsgrad and in the size of their table; kernel_name (cuda/launch_plan.cpp) gives their
// names. The other kernels' names are in python/gpu_step.h. Both nvcc and NVRTC compile this file.
#include "cuda/child_kernel.h"
#include "cuda/device_constants.h"
#include "cuda/norm_kernel.h"
#include "cuda/rounded_child_kernel.h"
#include "cuda/rounded_kernel.h"
#include "cuda/select_kernel.h"
#include "cuda/squares_kernel.h"
#include "cuda/step_kernel.h"
#include "cuda/warp.h"

namespace childtune {

__device__ __forceinline__ int thread_number() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int warp_number() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ __forceinline__ GpuWarp this_warp() { return {static_cast<int>(threadIdx.x % kWarp)}; }

template <class P, bool kAmsgrad, class Table>
__device__ __forceinline__ void step_child_block(const Table& table) {
  __shared__ SlotPlaces places[kThreads / kWarp];
  step_child_warp<P, kAmsgrad>(table, blockIdx.x, warp_number(), places[warp_number()], this_warp());
}

template <class P, class Table>
__device__ __forceinline__ void step_rounded_child_block(const Table& table) {
  __shared__ SlotPlaces places[kThreads / kWarp];
  step_rounded_child_warp<P>(table, blockIdx.x, warp_number(), places[warp_number()], this_warp());
}

}  // namespace childtune

// At least so many blocks of threads share a multiprocessor's registers: the most for which compilers do not spill, but
// for NVRTC 13.5 in steps that round on 12.0. Without this bound, some compilers spill to have room for more blocks.
#define CHILDTUNE_BLOCKS(P, kMasked, kAmsgrad) (sizeof(childtune::ComputeType<P>::type) == 8 ? 1 : (kAmsgrad) ? 3 : 4)

#define CHILDTUNE_KERNEL(name, P, Item, kMasked, kAmsgrad, kBytes)                                                \
  extern "C" __global__ void __launch_bounds__(childtune::kThreads, CHILDTUNE_BLOCKS(P, kMasked, kAmsgrad)) name( \
      __grid_constant__ const childtune::StepTable<childtune::ComputeType<P>::type, childtune::Item, kBytes> table)

#define CHILDTUNE_STEP(name, P, kMasked, kAmsgrad, kBytes)                                                           \
  CHILDTUNE_KERNEL(name, P, TableItem, kMasked, kAmsgrad, kBytes) {                                                  \
    childtune::step_warp<P, kMasked, kAmsgrad>(table, blockIdx.x, childtune::warp_number(), childtune::this_warp()); \
  }
#define CHILDTUNE_CHILD_STEP(name, P, kMasked, kAmsgrad, kBytes) \
  CHILDTUNE_KERNEL(name, P, ChildItem, kMasked, kAmsgrad, kBytes) { childtune::step_child_block<P, kAmsgrad>(table); }
// These serve amsgrad too.
#define CHILDTUNE_ROUNDED_STEP(name, P, kMasked, kAmsgrad, kBytes)                                                 \
  CHILDTUNE_KERNEL(name, P, RoundedItem, kMasked, kAmsgrad, kBytes) {                                              \
    childtune::step_rounded_warp<P, kMasked>(table, blockIdx.x, childtune::warp_number(), childtune::this_warp()); \
  }
#define CHILDTUNE_ROUNDED_CHILD_STEP(name, P, kMasked, kAmsgrad, kBytes) \
  CHILDTUNE_KERNEL(name, P, RoundedItem, kMasked, kAmsgrad, kBytes) { childtune::step_rounded_child_block<P>(table); }

// Compilers know large arguments since CUDA 12.1.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define CHILDTUNE_SIZES(kernel, name, P, kMasked, kAmsgrad)              \
  kernel(name##_small, P, kMasked, kAmsgrad, childtune::kSmallArguments) \
      kernel(name##_large, P, kMasked, kAmsgrad, childtune::kLargeArguments)
#else
#define CHILDTUNE_SIZES(kernel, name, P, kMasked, kAmsgrad) \
  kernel(name##_small, P, kMasked, kAmsgrad, childtune::kSmallArguments)
#endif

#define CHILDTUNE_KINDS(name, P)                                        \
  CHILDTUNE_SIZES(CHILDTUNE_STEP, name, P, false, false)                \
  CHILDTUNE_SIZES(CHILDTUNE_STEP, name##_amsgrad, P, false, true)       \
  CHILDTUNE_SIZES(CHILDTUNE_STEP, name##_masked, P, true, false)        \
  CHILDTUNE_SIZES(CHILDTUNE_STEP, name##_masked_amsgrad, P, true, true) \
  CHILDTUNE_SIZES(CHILDTUNE_CHILD_STEP, name##_child, P, true, false)   \
  CHILDTUNE_SIZES(CHILDTUNE_CHILD_STEP, name##_child_amsgrad, P, true, true)

#define CHILDTUNE_ROUNDED_KINDS(name, P)                                        \
  CHILDTUNE_SIZES(CHILDTUNE_ROUNDED_STEP, name##_rounded, P, false, true)       \
  CHILDTUNE_SIZES(CHILDTUNE_ROUNDED_STEP, name##_masked_rounded, P, true, true) \
  CHILDTUNE_SIZES(CHILDTUNE_ROUNDED_CHILD_STEP, name##_child_rounded, P, true, true)

CHILDTUNE_KINDS(step_float32, float)
CHILDTUNE_KINDS(step_float64, double)
CHILDTUNE_KINDS(step_bfloat16, childtune::BFloat16)
CHILDTUNE_KINDS(step_float16, childtune::Float16)
CHILDTUNE_ROUNDED_KINDS(step_float32, float)
CHILDTUNE_ROUNDED_KINDS(step_bfloat16, childtune::BFloat16)
CHILDTUNE_ROUNDED_KINDS(step_float16, childtune::Float16)

#define CHILDTUNE_SIMPLE(name, Argument)                            \
  extern "C" __global__ void __launch_bounds__(childtune::kThreads) \
      name(__grid_constant__ const childtune::Argument argument)

CHILDTUNE_SIMPLE(count_steps, ConstantsTable) {
  childtune::count_step(argument, int64_t{blockIdx.x} * childtune::kThreads + threadIdx.x);
}

CHILDTUNE_SIMPLE(norm_chunks, NormTable) {
  childtune::sum_chunks(argument, blockIdx.x, childtune::warp_number(), childtune::this_warp());
}

CHILDTUNE_SIMPLE(norm_tensors, NormTable) { childtune::sum_tensor(argument, blockIdx.x, childtune::GpuBlock{}); }

CHILDTUNE_SIMPLE(norm_total, NormTotal) {
  if (threadIdx.x == 0) childtune::sum_total(argument);
}

CHILDTUNE_SIMPLE(add_squares, SquaresArgument) {
  childtune::add_squares(argument, blockIdx.x, childtune::thread_number());
}

CHILDTUNE_SIMPLE(count_digits, ScoreTable) {
  __shared__ uint32_t counts[childtune::kDigits];
  childtune::count_digits(argument, blockIdx.x, counts, childtune::GpuBlock{});
}

CHILDTUNE_SIMPLE(write_above, ScoreTable) {
  childtune::write_above(argument, blockIdx.x, childtune::warp_number(), childtune::this_warp());
}

CHILDTUNE_SIMPLE(add_ties, ScoreTable) {
  childtune::add_ties(argument, blockIdx.x, childtune::warp_number(), childtune::this_warp());
}
