// What the kernels' functions need of a GPU, in device code. GpuWarp runs the phases of cuda/step_kernel.h and
// cuda/child_kernel.h: every lane goes through them, and exchanges or waits in between; and it adds up what its lanes
// have. GpuBlock is a block of threads that share work and wait for each other.
#pragma once

#include "core/compiler.h"
#include "cuda/child_kernel.h"
#include "cuda/rounded_child_kernel.h"
#include "cuda/rounded_kernel.h"
#include "cuda/step_kernel.h"

namespace childtune {

struct GpuWarp {
  int lane;

  // Runs the phases of a tile. All lanes of a warp must call it together.
  template <class Tile>
  __device__ __forceinline__ void run(const Tile& tile) const {
    typename Tile::Loaded loaded = tile.load(lane);
    tile.update(lane, Tile::kDraws ? exchange(tile.draw(lane)) : Kept{}, loaded);
  }

  // Runs the phases of a packed block. All lanes of a warp must call it together; `places` is memory that they share.
  template <class Step>
  __device__ __forceinline__ void run(const Step& step, SlotPlaces& places) const {
    const uint32_t word = step.word(lane);
    const int own = count_ones(word);
    const int until = sum_until(own);
    const int slots = __shfl_sync(~0u, until, kWarp - 1);
    if (!step.fits(slots)) return;
    step.list(lane, word, until - own, places);
    if (step.item.decay_outside) step.decay(lane);
    __syncwarp();
    step.update(lane, slots, places);
  }

  // Runs the phases of a tile of a RoundedItem. All lanes of a warp must call it together.
  template <class Tile>
  __device__ __forceinline__ void run_rounded(const Tile& tile) const {
    const RoundingWords drawn = tile.draw_words(lane);
    const Kept kept = Tile::kDraws ? exchange(tile.draw(lane)) : Kept{};
    CHILDTUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const typename Tile::Loaded loaded = tile.load(lane, half);
      const RoundingWords words = of_lane(drawn, kWarp / 2 * half);
      Quad<float> quad = tile.update(lane, half, kept.of[half], words, loaded);
      PerAverage most{};
      if (tile.has_codes()) most = greatest(tile.most(lane, half, quad), tile.averages());
      tile.store(lane, half, most, words, quad);
    }
  }

  // Runs the phases of a packed block of a RoundedItem. All lanes of a warp must call it together; `places` is memory
  // that they share.
  template <class Step>
  __device__ __forceinline__ void run_rounded(const Step& step, SlotPlaces& places) const {
    const uint32_t word = step.word(lane);
    const int own = count_ones(word);
    const int until = sum_until(own);
    if (!step.fits(__shfl_sync(~0u, until, kWarp - 1))) return;
    step.list(lane, word, until - own, places);
    if (step.item.decay_outside) step.decay(lane);
    __syncwarp();
    const RoundingWords drawn = step.draw_words(lane);
    SlotSpan slots{0, 0, 0};
#pragma unroll 1
    for (; slots.number < kMaskBlocks; ++slots.number) {
      slots.first = slots.end;
      slots.end = __shfl_sync(~0u, until, kMaskLanes * slots.number + kMaskLanes - 1);
      const RoundingWords words = of_lane(drawn, slots.number);
      Quad<float> quad{};
      CHILDTUNE_UNROLLED
      for (int round = 0; round < 4 / kSlotRounds; ++round) {
        const typename Step::Loaded loaded = step.load(lane, slots, round, places);
        step.update(lane, slots, round, words, loaded, quad);
      }
      const PerAverage most = step.has_codes() ? greatest(step.most(lane, slots, quad), step.averages()) : PerAverage{};
      step.store(lane, slots, places, most, words, quad);
    }
  }

  // Returns the sum of what this lane and those before it have.
  __device__ __forceinline__ int sum_until(int own) const {
    int until = own;
    CHILDTUNE_UNROLLED
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(~0u, until, distance);
      if (lane >= distance) until += before;
    }
    return until;
  }

  // Returns what lane `from` has.
  __device__ __forceinline__ RoundingWords of_lane(const RoundingWords& own, int from) const {
    return {__shfl_sync(~0u, own.exp_avg, from), __shfl_sync(~0u, own.exp_avg_sq, from),
            __shfl_sync(~0u, own.param, from), __shfl_sync(~0u, own.max_exp_avg_sq, from)};
  }

  // Returns the greatest of what all lanes have.
  __device__ __forceinline__ PerAverage greatest(PerAverage own, int averages) const {
    CHILDTUNE_UNROLLED
    for (int a = 0; a < kAverages; ++a) {
      if (a < averages) own.of[a] = greatest(own.of[a]);
    }
    return own;
  }
  __device__ __forceinline__ uint32_t greatest(uint32_t own) const {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, own);
#else
    CHILDTUNE_UNROLLED
    for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(~0u, own, distance);
      own = other > own ? other : own;
    }
    return own;
#endif
  }

  // Gives each lane the masks of its own elements, of what all lanes have drawn. First the lanes 4 * j .. 4 * j + 3 put
  // theirs together, one byte of a word for each.
  __device__ __forceinline__ Kept exchange(uint32_t bits) const {
    uint32_t bytes = bits << (8 * (lane % 4));
    bytes |= __shfl_xor_sync(~0u, bytes, 1);
    bytes |= __shfl_xor_sync(~0u, bytes, 2);
    const int from = 4 * (lane % 4);
    return {{__shfl_sync(~0u, bytes, from) >> (lane / 4), __shfl_sync(~0u, bytes, from + kWarp / 2) >> (lane / 4)}};
  }

  // Returns in bit l what `of_lane` returns for lane l.
  template <class OfLane>
  __device__ __forceinline__ uint32_t vote(const OfLane& of_lane) const {
    return __ballot_sync(~0u, of_lane(lane));
  }

  // Returns what `of_lane` returns for each lane; `vote` with it is like the other, of a function of that value.
  template <class OfLane>
  __device__ __forceinline__ auto each(const OfLane& of_lane) const {
    return of_lane(lane);
  }
  template <class Value, class OfValue>
  __device__ __forceinline__ uint32_t vote(const Value& own, const OfValue& of_value) const {
    return __ballot_sync(~0u, of_value(own));
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
