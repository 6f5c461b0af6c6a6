// Tables are filled with one kind of parameter after the other, and sent off when full.
#include "cuda/launch_plan.h"

#include <algorithm>
#include <new>

namespace childtune {
namespace {

constexpr int64_t kMostBlocks = 0x7FFFFFFF;  // of a launch: CUDA's limit

Kind kind_of(const StepItem& item, bool large) {
  return {item.dtype, item.masked, item.data[kMaxExpAvgSq] != nullptr, large};
}

bool same_kind(const Kind& a, const Kind& b) {
  return a.dtype == b.dtype && a.masked == b.masked && a.amsgrad == b.amsgrad;
}

int64_t run_of(const StepItem& item) { return item.slice.run == 0 ? item.numel : std::min(item.slice.run, item.numel); }

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Tiles begin at mask blocks, so a run that begins within one takes as much more room.
int64_t tiles_per_run(const StepItem& item) {
  const int64_t run = run_of(item);
  int64_t first = static_cast<int64_t>(item.slice.offset % kMaskBlock);
  if (run < item.numel && item.slice.stride % kMaskBlock != 0) first = kMaskBlock - 1;  // the most that a run may have
  return divide_up(run, kTile) + (first + (run - 1) % kTile + 1 > kTile);
}

// Blocks of threads for an item that is not empty; more than kMostBlocks: too many.
int64_t blocks_of(const StepItem& item) {
  const int64_t runs = divide_up(item.numel, run_of(item)), tiles = tiles_per_run(item);
  if (runs > kMostBlocks * kChunkTiles / tiles) return kMostBlocks + 1;
  return divide_up(runs * tiles, kChunkTiles);
}

// Whether the four elements that a lane takes lie at a multiple of their size, or of 16 bytes, in every array and run.
bool has_vectors(const StepItem& item) {
  if (run_of(item) < item.numel && (item.slice.run % 4 != 0 || item.slice.stride % 4 != 0)) return false;
  const uintptr_t state_size = item.dtype == DType::kFloat64 ? 8 : 4;
  const uintptr_t param_size = item.dtype == DType::kBFloat16 || item.dtype == DType::kFloat16 ? 2 : state_size;
  for (int s = 0; s < kStreams; ++s) {
    if (item.data[s] == nullptr) continue;
    const uintptr_t size = s <= kGrad ? param_size : state_size;
    const uintptr_t first_quad = reinterpret_cast<uintptr_t>(item.data[s]) - item.slice.offset % 4 * size;
    if (first_quad % std::min<uintptr_t>(4 * size, 16) != 0) return false;
  }
  return true;
}

template <class T>
StepClass<T> class_of(const StepItem& item) {
  return {item.constants.cast<T>(), item.key.seed, item.key.step, item.keep_threshold};
}

template <class T>
bool same(const StepClass<T>& a, const StepClass<T>& b) {
  static_assert(sizeof(a) == sizeof(AdamWConstants<T>) + 16, "no padding between the bytes compared");
  return memcmp(&a, &b, sizeof(a)) == 0;
}

// A table being filled. The latest class comes first: parameters of a group mostly follow each other.
template <class T, int kBytes>
class Filler {
 public:
  explicit Filler(StepTable<T, kBytes>* table) : table_(table) {}

  // Returns false if the table has no room.
  bool add(const StepItem& item) {
    const int64_t blocks = blocks_of(item);
    if (table_->header.items == StepTable<T, kBytes>::kItems || blocks_ + blocks > kMostBlocks) return false;
    const StepClass<T> wanted = class_of<T>(item);
    int number = classes_ - 1;
    while (number >= 0 && !same(table_->classes[number], wanted)) --number;
    if (number < 0) {
      if (classes_ == StepTable<T, kBytes>::kClasses) return false;
      number = classes_++;
      table_->classes[number] = wanted;
    }
    TableItem& entry = table_->items[table_->header.items++];
    std::copy(item.data, item.data + kStreams, entry.data);
    entry.numel = item.numel;
    entry.run = run_of(item);
    entry.offset = item.slice.offset;
    entry.stride = item.slice.stride;
    entry.tiles_per_run = tiles_per_run(item);
    entry.first_block = static_cast<uint32_t>(blocks_);
    entry.param_index = item.key.param_index;
    entry.step_class = static_cast<uint32_t>(number);
    entry.vectors = has_vectors(item);
    blocks_ += blocks;
    return true;
  }

  uint32_t blocks() const { return static_cast<uint32_t>(blocks_); }

 private:
  StepTable<T, kBytes>* table_;
  int classes_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace

Refusal refusal(const StepItem& item) {
  if (item.layout != nullptr) return Refusal::kStrided;
  if (item.child.bits != nullptr) return Refusal::kChildNetwork;
  if (item.numel > 0 && blocks_of(item) > kMostBlocks) return Refusal::kTooLarge;
  return Refusal::kNone;
}

int kind_number(const Kind& kind) {
  return static_cast<int>(kind.dtype) * 8 + kind.masked * 4 + kind.amsgrad * 2 + kind.large;
}

const char* kernel_name(const Kind& kind) {
#define CHILDTUNE_NAMES(dtype)                                                                                \
  #dtype "_small", #dtype "_large", #dtype "_amsgrad_small", #dtype "_amsgrad_large", #dtype "_masked_small", \
      #dtype "_masked_large", #dtype "_masked_amsgrad_small", #dtype "_masked_amsgrad_large"
  static const char* const names[kKinds] = {CHILDTUNE_NAMES(step_float32), CHILDTUNE_NAMES(step_float64),
                                            CHILDTUNE_NAMES(step_bfloat16), CHILDTUNE_NAMES(step_float16)};
#undef CHILDTUNE_NAMES
  return names[kind_number(kind)];
}

bool LaunchPlan::build(const std::vector<StepItem>& items, const DeviceConstants* constants, const float* found_inf) {
  launches_.clear();
  int64_t counts[kKinds] = {};
  for (const StepItem& item : items) {
    if (refusal(item) != Refusal::kNone) return false;
    if (item.numel > 0) ++counts[kind_number(kind_of(item, false))];
  }
  const TableHeader header{constants, found_inf, 0};
  for (const StepItem& item : items) {
    int64_t& count = counts[kind_number(kind_of(item, false))];
    if (item.numel == 0 || count == 0) continue;
    if (item.dtype == DType::kFloat64) {
      const bool large = large_arguments_ && count > StepTable<double, kSmallArguments>::kItems;
      large ? add_items<double, kLargeArguments>(kind_of(item, true), items, header)
            : add_items<double, kSmallArguments>(kind_of(item, false), items, header);
    } else {
      const bool large = large_arguments_ && count > StepTable<float, kSmallArguments>::kItems;
      large ? add_items<float, kLargeArguments>(kind_of(item, true), items, header)
            : add_items<float, kSmallArguments>(kind_of(item, false), items, header);
    }
    count = 0;  // all of this kind are in
  }
  return true;
}

template <class T, int kBytes>
void LaunchPlan::add_items(const Kind& kind, const std::vector<StepItem>& items, const TableHeader& header) {
  Filler<T, kBytes> filler(start_launch<T, kBytes>(kind, header));
  for (const StepItem& item : items) {
    if (item.numel == 0 || !same_kind(kind_of(item, false), kind)) continue;
    if (!filler.add(item)) {
      filler = Filler<T, kBytes>(start_launch<T, kBytes>(kind, header));
      filler.add(item);
    }
    launches_.back().blocks = filler.blocks();
  }
}

template <class T, int kBytes>
StepTable<T, kBytes>* LaunchPlan::start_launch(const Kind& kind, const TableHeader& header) {
  launches_.push_back({kind, 0});
  if (arguments_.size() < launches_.size()) arguments_.emplace_back();
  auto* table = new (arguments_[launches_.size() - 1].bytes) StepTable<T, kBytes>;
  table->header = header;
  return table;
}

}  // namespace childtune
