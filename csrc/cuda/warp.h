// What the kernels' functions need of a GPU, in device code. GpuWarp runs the phases of cuda/step_kernel.h and
// cuda/child_kernel.h: every lane goes through them, and votes or waits in between; and it adds up what its lanes have.
// GpuBlock is a block of threads that share work and wait for each other.
#pragma once

#include "core/compiler.h"
#include "cuda/launch.h"

namespace childtune {

struct GpuWarp {
  int lane;

  // Runs the phases of a tile. All lanes of a warp must call it together.
  template <class Tile>
  __device__ __forceinline__ void run(const Tile& tile) const {
    typename Tile::Loaded loaded = tile.load(lane);
    tile.update(lane, Tile::kDraws ? exchange(tile.draw(lane)) : 0, loaded);
  }

  // Runs the phases of a piece. All lanes of a warp must call it together; `slots` is memory that they share.
  template <class Piece, class Slots>
  __device__ __forceinline__ void run(const Piece& piece, Slots& slots) const {
    typename Piece::Loaded loaded = piece.load(lane);
    __syncwarp();  // no lane reads the slots of the last piece any more
    piece.compress(loaded, slots);
    __syncwarp();
    piece.update(lane, loaded, slots);
    __syncwarp();
    piece.expand(lane, loaded, slots);
  }

  // Votes eight times, on each of the lane's eight bits; returns the vote that this lane needs.
  __device__ __forceinline__ uint32_t exchange(uint32_t bits) const {
    uint32_t own = 0;
    CHILDTUNE_UNROLLED
    for (int k = 0; k < 8; ++k) {
      const uint32_t vote = __ballot_sync(~0u, (bits >> k & 1) != 0);
      own = lane / 4 == k ? vote : own;
    }
    return own;
  }

  // Returns in bit l what `of_lane` returns for lane l.
  template <class OfLane>
  __device__ __forceinline__ uint32_t vote(const OfLane& of_lane) const {
    return __ballot_sync(~0u, of_lane(lane));
  }

  template <class V>
  __device__ __forceinline__ void write(V* to, V value) const {
    if (lane == 0) *to = value;
  }

  // Adds up by halving: lane k of the first half adds what lane k of the second has, and so on. Writes the sum to `to`.
  template <class OfLane>
  __device__ __forceinline__ void sum(const OfLane& of_lane, double* to) const {
    double value = of_lane(lane);
    CHILDTUNE_UNROLLED
    for (int half = kWarp / 2; half >= 1; half /= 2) value += __shfl_down_sync(~0u, value, half);
    write(to, value);
  }
};

struct GpuBlock {
  // Calls function(i) for i in 0 .. n-1, spread over the threads, and waits for all calls.
  template <class Function>
  __device__ __forceinline__ void each(int64_t n, const Function& function) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) function(i);
    __syncthreads();
  }

  // Adds to a number that other threads may be adding to.
  __device__ __forceinline__ void add(uint32_t* to, uint32_t n) const { atomicAdd(to, n); }
  __device__ __forceinline__ void add(int64_t* to, uint32_t n) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
  }
};

}  // namespace childtune
