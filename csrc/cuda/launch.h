// What every launch has in common: the threads of a block, the size of a kernel's argument, and how a block finds its
// item in a table.
#pragma once

#include "core/compiler.h"

namespace childtune {

constexpr int kWarp = 32;      // lanes
constexpr int kThreads = 256;  // of a block of threads

// Bytes that a kernel's argument may have: before CUDA 12.1, and since then on sm_70 and later.
constexpr int kSmallArguments = 4096, kLargeArguments = 32764;

// Returns the last of 0 .. n-1 for which `begins(i)` holds. It holds for 0, and for no number after one for which it
// does not.
template <class Begins>
CHILDTUNE_INLINE int last_that(int n, const Begins& begins) {
  int low = 0, high = n;  // it is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begins(middle)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Returns the number of the item that a chunk belongs to, of a table whose items begin at chunks.
template <class Table>
CHILDTUNE_INLINE int item_of_chunk(const Table& table, int64_t chunk) {
  return last_that(static_cast<int>(table.count), [&](int i) { return table.items[i].first_chunk <= chunk; });
}

}  // namespace childtune
