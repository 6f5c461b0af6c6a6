// A warp of the GPU, as cuda/step_kernel.h runs its phases: every lane goes through them, and votes in between. And
// what cuda/norm_kernel.h needs: lanes that add up, and a block's threads that wait for each other.
#pragma once

#include "cuda/step_table.h"

namespace childtune {

struct GpuWarp {
  int lane;

  // All lanes of a warp call it together.
  template <class Tile>
  __device__ __forceinline__ void run(const Tile& tile) const {
    typename Tile::Loaded loaded = tile.load(lane);
    tile.update(lane, Tile::kDraws ? exchange(tile.draw(lane)) : 0, loaded);
  }

  __device__ __forceinline__ uint32_t exchange(uint32_t bits) const {
    uint32_t own = 0;
    CHILDTUNE_UNROLLED
    for (int k = 0; k < 8; ++k) {
      const uint32_t vote = __ballot_sync(~0u, (bits >> k & 1) != 0);
      own = lane / 4 == k ? vote : own;
    }
    return own;
  }

  // Lane k of the first half adds what lane k of the second has, and so on.
  template <class OfLane>
  __device__ __forceinline__ void sum(const OfLane& of_lane, double* to) const {
    double value = of_lane(lane);
    CHILDTUNE_UNROLLED
    for (int half = kWarp / 2; half >= 1; half /= 2) value += __shfl_down_sync(~0u, value, half);
    if (lane == 0) *to = value;
  }
};

struct GpuBlock {
  template <class Function>
  __device__ __forceinline__ void each(int64_t n, const Function& function) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) function(i);
    __syncthreads();
  }
};

}  // namespace childtune
