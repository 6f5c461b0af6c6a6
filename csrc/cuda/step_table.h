// The argument of a step's kernel: a table of parameters, passed by value, and which piece of which parameter each
// block of threads takes. cuda/child_kernel.h says how parameters with a child network are cut.
//
// Work goes in tiles of 256 elements, one to a warp at a time: two of the mask's blocks, so 32 Philox counters, one per
// lane. Tiles begin where mask blocks begin, so the first and last of a run may be partly empty. A parameter has
// `tiles_per_run` of them for each run of a shard (one run, if it is whole), and 32 consecutive ones are the chunk of a
// block of threads. Blocks of threads are numbered through the whole table.
#pragma once

#include "core/step_item.h"
#include "cuda/device_constants.h"
#include "cuda/launch.h"

namespace childtune {

constexpr int kTile = 2 * kMaskBlock;
constexpr int kChunkTiles = 32;
constexpr uint8_t kAllVectors = (1 << kStreams) - 1;

// What parameters of one group with the same step count share.
template <class T>
struct StepClass {
  AdamWConstants<T> constants;  // these and `step` are set only if the host counts the steps
  uint64_t seed;
  uint32_t step, keep_threshold;
};

struct TableItem {
  void* data[kStreams];
  int64_t numel;
  int64_t run;  // run, offset and stride as in MaskSlice, but run is numel if there is only one
  uint64_t offset, stride;
  int64_t tiles_per_run;
  uint32_t first_block;  // of threads, counted through the table
  uint32_t param_index;  // as in MaskKey
  uint32_t step_class;   // its number in StepTable::classes
  uint8_t vectors;       // bit s: every quad that a lane takes of stream s is aligned
};

// A parameter of which a child network is trained. It is whole, and its state is the child network's alone.
struct ChildItem {
  void* data[kStreams];
  int64_t numel;
  PackedMask child;
  uint32_t first_block;  // this and the next three as in TableItem
  uint32_t param_index;
  uint32_t step_class;
  uint8_t vectors;
  bool decay_outside;
};

// A parameter whose state is stored in fewer bits than computes, or whose weights are rounded stochastically. It is one
// run, which begins at a mask block. With a child network, its state is the child network's alone.
struct RoundedItem {
  void* data[kStreams];        // of state; kMaxExpAvgSq: nullptr without amsgrad
  uint8_t* scales[kAverages];  // of StateKind::kCodes, as in StepItem
  int64_t numel;
  PackedMask child;           // bits is nullptr without a child network
  uint64_t first_mask_block;  // in the whole parameter
  uint32_t first_block;       // this and the next three as in TableItem
  uint32_t param_index;
  uint32_t step_class;
  uint8_t vectors;
  StateKind state;
  bool stochastic;  // the weights are rounded stochastically
  bool decay_outside;
};

struct TableHeader {
  const DeviceConstants* constants;  // on the device, by param_index; nullptr: StepClass's are used
  const float* found_inf;            // on the device: unless zero, nothing is written; nullptr: zero
  int64_t items;
};

// T: the type that computes. Item: TableItem, ChildItem or RoundedItem.
template <class T, class Item, int kBytes>
struct StepTable {
  static constexpr int kClasses = kBytes / 512;
  static constexpr int kItems =
      static_cast<int>((kBytes - sizeof(TableHeader) - kClasses * sizeof(StepClass<T>)) / sizeof(Item));
  TableHeader header;
  StepClass<T> classes[kClasses];
  Item items[kItems];
  static_assert(sizeof(header) + sizeof(classes) + sizeof(items) <= kBytes, "an argument's limit");
};

// Returns the number of the item that a block of threads works on.
template <class Table>
CHILDTUNE_INLINE int item_of_block(const Table& table, uint32_t block) {
  return last_that(static_cast<int>(table.header.items), [&](int i) { return table.items[i].first_block <= block; });
}

// Returns what parameters of a class share in this step, whether the host counts it or the GPU.
template <class T, class Item>
CHILDTUNE_INLINE StepClass<T> class_of(const TableHeader& header, const StepClass<T>& step_class, const Item& item) {
  if (header.constants == nullptr) return step_class;
  const DeviceConstants& counted = header.constants[item.param_index];
  return {counted.constants.cast<T>(), step_class.seed, counted.step, step_class.keep_threshold};
}

CHILDTUNE_INLINE bool is_skipped(const TableHeader& header) {
  return header.found_inf != nullptr && *header.found_inf != 0.0f;
}

// Where a tile lies: its elements are those of [begin, begin + 256) that are in [low, high), by index in the item's
// arrays, and its mask blocks are `mask_block` and the next.
struct TileSpan {
  int64_t begin, low, high;
  uint64_t mask_block;
};

// Returns where a tile lies; for one beyond the last, low >= high.
CHILDTUNE_INLINE TileSpan tile_span(const TableItem& item, int64_t tile) {
  int64_t run = 0, low = 0;
  uint64_t element = item.offset;
  if (tile >= item.tiles_per_run) {  // most parameters are whole, and need no division
    run = tile / item.tiles_per_run;
    low = run * item.run;
    element += static_cast<uint64_t>(run) * item.stride;
    tile -= run * item.tiles_per_run;
  }
  const int64_t end = low + item.run;
  return {low + tile * kTile - static_cast<int64_t>(element % kMaskBlock), low, end < item.numel ? end : item.numel,
          element / kMaskBlock + 2 * static_cast<uint64_t>(tile)};
}

}  // namespace childtune
