// A warp of the GPU, as cuda/step_kernel.h runs its phases: every lane goes through them, and votes in between.
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
};

}  // namespace childtune
