// A warp of the GPU, as cuda/step_kernel.h and cuda/child_kernel.h run their phases: every lane goes through them, and
// votes or waits in between. And what cuda/norm_kernel.h and cuda/selection_kernel.h need: lanes that add
// up, and a block's threads that wait for each other.
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

  // Likewise; `slots` is memory that the warp shares.
  template <class Piece, class Slots>
  __device__ __forceinline__ void run(const Piece& piece, Slots& slots) const {
    typename Piece::Loaded loaded = piece.load(lane);
    __syncwarp();  // the slots' last readers have done
    piece.collect(loaded, slots);
    __syncwarp();
    piece.update(lane, loaded, slots);
    __syncwarp();
    piece.put_back(lane, loaded, slots);
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

  // Bit l: what `of_lane` says of lane l.
  template <class OfLane>
  __device__ __forceinline__ uint32_t vote(const OfLane& of_lane) const {
    return __ballot_sync(~0u, of_lane(lane));
  }

  template <class V>
  __device__ __forceinline__ void write(V* to, V value) const {
    if (lane == 0) *to = value;
  }

  // Lane k of the first half adds what lane k of the second has, and so on.
  template <class OfLane>
  __device__ __forceinline__ void sum(const OfLane& of_lane, double* to) const {
    double value = of_lane(lane);
    CHILDTUNE_UNROLLED
    for (int half = kWarp / 2; half >= 1; half /= 2) value += __shfl_down_sync(~0u, value, half);
    write(to, value);
  }
};

struct GpuBlock {
  template <class Function>
  __device__ __forceinline__ void each(int64_t n, const Function& function) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) function(i);
    __syncthreads();
  }

  // Adds to memory that the block's threads share, or all threads.
  __device__ __forceinline__ void add(uint32_t* to, uint32_t n) const { atomicAdd(to, n); }
  __device__ __forceinline__ void add(int64_t* to, uint32_t n) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
  }
};

}  // namespace childtune
