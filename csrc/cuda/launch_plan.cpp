// Fills tables with one kind of parameter after the other, and begins the next where one is full.
#include "cuda/launch_plan.h"

#include <algorithm>
#include <new>

namespace childtune {
namespace {

constexpr int64_t kMostBlocks = 0x7FFFFFFF;  // of a launch: CUDA's limit

// The order of dtypes in the kernels' numbers: the one that has no rounded kernels is the last.
constexpr DType kOrder[kDTypes] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};

// Returns the kind of the item's kernel; `large` is not known here, and false.
Kind kind_of(const StepItem& item) {
  const Trained trained = item.child.bits != nullptr ? Trained::kChild : item.masked ? Trained::kMasked : Trained::kAll;
  const Storage storage = is_rounded(item)                     ? Storage::kRounded
                          : item.data[kMaxExpAvgSq] != nullptr ? Storage::kAmsgrad
                                                               : Storage::kPlain;
  return {item.dtype, trained, storage, false};
}

int64_t run_of(const StepItem& item) { return item.slice.run == 0 ? item.numel : std::min(item.slice.run, item.numel); }

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Tiles begin at mask blocks, so a run that begins within a mask block may need one tile more.
int64_t tiles_per_run(const StepItem& item) {
  const int64_t run = run_of(item);
  int64_t first = static_cast<int64_t>(item.slice.offset % kMaskBlock);
  if (run < item.numel && item.slice.stride % kMaskBlock != 0) first = kMaskBlock - 1;  // the most that a run may have
  return divide_up(run, kTile) + (first + (run - 1) % kTile + 1 > kTile);
}

// Returns the blocks of threads for an item that is not empty; more than kMostBlocks if a launch cannot have so many.
int64_t blocks_of(const StepItem& item) {
  const int64_t runs = divide_up(item.numel, run_of(item)), tiles = tiles_per_run(item);
  if (runs > kMostBlocks * kChunkTiles / tiles) return kMostBlocks + 1;
  return divide_up(runs * tiles, kChunkTiles);
}

// Returns in bit s whether every quad that a lane takes of stream s lies at a multiple of its size, or of 16 bytes, in
// every run. A stream that is not there is aligned.
uint8_t vectors_of(const StepItem& item) {
  if (run_of(item) < item.numel && (item.slice.run % 4 != 0 || item.slice.stride % 4 != 0)) return 0;
  uint8_t vectors = kAllVectors;
  for (int s = 0; s < kStreams; ++s) {
    if (item.data[s] == nullptr) continue;
    const auto size = static_cast<uintptr_t>(element_size(item, s));
    const uintptr_t first_quad = reinterpret_cast<uintptr_t>(item.data[s]) - item.slice.offset % 4 * size;
    if (first_quad % std::min<uintptr_t>(4 * size, 16) != 0) vectors &= static_cast<uint8_t>(~(1u << s));
  }
  return vectors;
}

template <class T>
StepClass<T> wanted_class(const StepItem& item) {
  return {item.constants.cast<T>(), item.key.seed, item.key.step, item.keep_threshold};
}

template <class T>
bool same(const StepClass<T>& a, const StepClass<T>& b) {
  static_assert(sizeof(a) == sizeof(AdamWConstants<T>) + 16, "no padding between the bytes compared");
  return memcmp(&a, &b, sizeof(a)) == 0;
}

void describe(const StepItem& item, TableItem* entry) {
  entry->run = run_of(item);
  entry->offset = item.slice.offset;
  entry->stride = item.slice.stride;
  entry->tiles_per_run = tiles_per_run(item);
}

void describe(const StepItem& item, ChildItem* entry) {
  entry->child = item.child;
  entry->decay_outside = item.decay_outside;
}

void describe(const StepItem& item, RoundedItem* entry) {
  std::copy(item.scales, item.scales + kAverages, entry->scales);
  entry->child = item.child;
  entry->first_mask_block = item.slice.offset / kMaskBlock;
  entry->state = item.state;
  entry->stochastic = item.stochastic;
  entry->decay_outside = item.decay_outside;
}

// Fills a table. Looks for an item's class from the latest one back, since parameters of a group mostly follow each
// other.
template <class Table>
class Filler {
 public:
  explicit Filler(Table* table) : table_(table) {}

  // Returns false if the table has no room.
  bool add(const StepItem& item) {
    const int64_t blocks = blocks_of(item);
    if (table_->header.items == Table::kItems || blocks_ + blocks > kMostBlocks) return false;
    const auto wanted = wanted_class<decltype(table_->classes[0].constants.eps)>(item);
    int number = classes_ - 1;
    while (number >= 0 && !same(table_->classes[number], wanted)) --number;
    if (number < 0) {
      if (classes_ == Table::kClasses) return false;
      number = classes_++;
      table_->classes[number] = wanted;
    }
    auto& entry = table_->items[table_->header.items++];
    std::copy(item.data, item.data + kStreams, entry.data);
    entry.numel = item.numel;
    describe(item, &entry);
    entry.first_block = static_cast<uint32_t>(blocks_);
    entry.param_index = item.key.param_index;
    entry.step_class = static_cast<uint32_t>(number);
    entry.vectors = vectors_of(item);
    blocks_ += blocks;
    return true;
  }

  uint32_t blocks() const { return static_cast<uint32_t>(blocks_); }

 private:
  Table* table_;
  int classes_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace

Refusal refusal(const StepItem& item) {
  if (item.layout != nullptr) return Refusal::kStrided;
  if (item.numel == 0) return Refusal::kNone;
  if (reinterpret_cast<uintptr_t>(item.child.bits) % kMaskAlignment != 0) return Refusal::kMisaligned;
  if (blocks_of(item) > kMostBlocks) return Refusal::kTooLarge;
  const bool whole = item.slice.offset % kMaskBlock == 0 && run_of(item) == item.numel;
  if (is_rounded(item) && !(whole && item.dtype != DType::kFloat64)) return Refusal::kNotRounded;
  return Refusal::kNone;
}

int kind_number(const Kind& kind) {
  const int dtype = static_cast<int>(std::find(kOrder, kOrder + kDTypes, kind.dtype) - kOrder);
  const int of_dtype = static_cast<int>(kind.storage) * kDTypes + dtype;
  return (of_dtype * kTrained + static_cast<int>(kind.trained)) * 2 + kind.large;
}

Kind kind_of_number(int number) {
  const int of_dtype = number / (kTrained * 2);
  return {kOrder[of_dtype % kDTypes], static_cast<Trained>(number / 2 % kTrained),
          static_cast<Storage>(of_dtype / kDTypes), number % 2 != 0};
}

std::string kernel_name(const Kind& kind) {
  static const char* const dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  static const char* const trained[] = {"", "_masked", "_child"};
  static const char* const storages[] = {"", "_amsgrad", "_rounded"};
  return std::string("step_") + dtypes[static_cast<int>(kind.dtype)] + trained[static_cast<int>(kind.trained)] +
         storages[static_cast<int>(kind.storage)] + (kind.large ? "_large" : "_small");
}

bool LaunchPlan::build(const std::vector<StepItem>& items, const DeviceConstants* constants, const float* found_inf) {
  launches_.clear();
  int64_t counts[kKinds] = {};
  for (const StepItem& item : items) {
    if (refusal(item) != Refusal::kNone) return false;
    if (item.numel > 0) ++counts[kind_number(kind_of(item))];
  }
  const TableHeader header{constants, found_inf, 0};
  for (int number = 0; number < kKinds; ++number) {
    if (counts[number] == 0) continue;
    const Kind kind = kind_of_number(number);
    const bool is_double = kind.dtype == DType::kFloat64;
    if (kind.storage == Storage::kRounded) {
      add_kind<float, RoundedItem>(kind, counts[number], items, header);
    } else if (kind.trained == Trained::kChild) {
      is_double ? add_kind<double, ChildItem>(kind, counts[number], items, header)
                : add_kind<float, ChildItem>(kind, counts[number], items, header);
    } else {
      is_double ? add_kind<double, TableItem>(kind, counts[number], items, header)
                : add_kind<float, TableItem>(kind, counts[number], items, header);
    }
  }
  return true;
}

template <class T, class Item>
void LaunchPlan::add_kind(Kind kind, int64_t count, const std::vector<StepItem>& items, const TableHeader& header) {
  using Small = StepTable<T, Item, kSmallArguments>;
  kind.large = large_arguments_ && count > Small::kItems;
  kind.large ? add_items<StepTable<T, Item, kLargeArguments>>(kind, items, header)
             : add_items<Small>(kind, items, header);
}

template <class Table>
void LaunchPlan::add_items(const Kind& kind, const std::vector<StepItem>& items, const TableHeader& header) {
  Kind of_items = kind;
  of_items.large = false;
  Filler<Table> filler(start_launch<Table>(kind, header));
  for (const StepItem& item : items) {
    if (item.numel == 0 || kind_number(kind_of(item)) != kind_number(of_items)) continue;
    if (!filler.add(item)) {
      filler = Filler<Table>(start_launch<Table>(kind, header));
      filler.add(item);
    }
    launches_.back().blocks = filler.blocks();
  }
}

template <class Table>
Table* LaunchPlan::start_launch(const Kind& kind, const TableHeader& header) {
  launches_.push_back({kind, 0});
  if (arguments_.size() < launches_.size()) arguments_.emplace_back();
  auto* table = new (arguments_[launches_.size() - 1].bytes) Table;
  table->header = header;
  return table;
}

}  // namespace childtune
