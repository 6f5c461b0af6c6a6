// Unit tests of cuda/launch_plan.h and cuda/step_table.h: which block works on which elements. Called by test_core.cpp.
#include <set>
#include <string>

#include "emulated_gpu.h"
#include "test_helpers.h"

// An item whose addresses are never read.
static StepItem imagined(int64_t numel, MaskSlice slice = {}) {
  StepItem item = Arrays<float>(1, 1).item(true, false, slice);
  for (int s = 0; s < kMaxExpAvgSq; ++s) item.data[s] = reinterpret_cast<void*>(uintptr_t{4096});
  item.numel = numel;
  return item;
}

// The item's last block has work, and one more would have none.
static void test_last_block(const TableItem& item, uint32_t end) {
  const auto tiles_of = [&](uint32_t block) { return int64_t{kChunkTiles} * (block - item.first_block); };
  const TileSpan last = tile_span(item, tiles_of(end - 1)), beyond = tile_span(item, tiles_of(end));
  expect(last.low < last.high, "the last block has work", item.numel);
  expect(beyond.low >= beyond.high || beyond.begin >= beyond.high, "a block more would have none", item.numel);
}

template <class Item>
static void test_last_block(const Item& item, uint32_t end) {
  const int64_t chunk = int64_t{kChunkTiles} * kTile, blocks = end - item.first_block;
  expect((blocks - 1) * chunk < item.numel && item.numel <= blocks * chunk, "blocks of a parameter without runs",
         item.numel);
}

// Blocks of threads follow each other without a gap, each finds its item, and each item has as many as it needs.
static void test_blocks(const LaunchPlan& plan) {
  for (size_t i = 0; i < plan.launches().size(); ++i) {
    const Launch& launch = plan.launches()[i];
    expect(launch.blocks >= 1 && launch.blocks <= 0x7FFFFFFF, "blocks of a launch", launch.blocks);
    visit_table(launch.kind, plan.argument(i), [&](const auto& table, auto) {
      expect(table.items[0].first_block == 0, "the first item has the first block");
      for (int k = 0; k < table.header.items; ++k) {
        const auto& item = table.items[k];
        const uint32_t end = k + 1 < table.header.items ? table.items[k + 1].first_block : launch.blocks;
        expect(item.first_block < end, "every item has a block", k);
        for (uint32_t block : {item.first_block, (item.first_block + end) / 2, end - 1}) {
          expect(item_of_block(table, block) == k, "a block finds its item", block);
        }
        test_last_block(item, end);
      }
    });
  }
}

// Every element is in exactly one tile, at the place of the mask that core/mask.h gives it.
static void test_coverage(int64_t numel, MaskSlice slice) {
  LaunchPlan plan(false);
  const StepItem item = imagined(numel, slice);
  expect(plan.build({item}, nullptr, nullptr) && plan.launches().size() == 1, "a plan of one item");
  test_blocks(plan);
  std::vector<int> seen(static_cast<size_t>(numel));
  const auto* table = static_cast<const StepTable<float, TableItem, kSmallArguments>*>(plan.argument(0));
  for (int64_t tile = 0; tile < int64_t{kChunkTiles} * plan.launches()[0].blocks; ++tile) {
    const TileSpan span = tile_span(table->items[0], tile);
    for (int64_t i = std::max(span.begin, span.low); i < std::min(span.begin + kTile, span.high); ++i) {
      ++seen[static_cast<size_t>(i)];
      const int64_t run = slice.run == 0 ? numel : slice.run;
      const uint64_t element = slice.offset + static_cast<uint64_t>(i / run) * slice.stride + i % run;
      const uint64_t tiles_say = span.mask_block * kMaskBlock + static_cast<uint64_t>(i - span.begin);
      expect(element == tiles_say, "an element's place in the mask", i);
    }
  }
  for (int64_t i = 0; i < numel; ++i) expect(seen[static_cast<size_t>(i)] == 1, "an element is in one tile", i);
}

// The tensors of BERT-large with its pooler and a classifier.
static std::vector<StepItem> bert_large() {
  const int64_t width = 1024, inner = 4096;
  std::vector<StepItem> items;
  const auto add = [&](int64_t numel, bool decays) {
    items.push_back(imagined(numel));
    items.back().key.param_index = static_cast<uint32_t>(items.size());
    items.back().constants.decay_before = decays ? 0.99 : 1.0;
  };
  for (int64_t rows : {int64_t{30522}, int64_t{512}, int64_t{2}}) add(rows * width, true);
  for (int i = 0; i < 2; ++i) add(width, false);
  for (int layer = 0; layer < 24; ++layer) {
    for (int i = 0; i < 4; ++i) add(width * width, true), add(width, false);
    add(width * inner, true), add(inner, false), add(inner * width, true), add(width, false);
    for (int i = 0; i < 4; ++i) add(width, false);
  }
  add(width * width, true), add(width, false), add(2 * width, true), add(2, false);
  return items;
}

static void test_launches() {
  const std::vector<StepItem> items = bert_large();
  expect(items.size() == 393, "BERT-large has so many tensors", static_cast<long long>(items.size()));
  for (bool large : {false, true}) {
    LaunchPlan plan(large);
    for (int repetition = 0; repetition < 2; ++repetition) expect(plan.build(items, nullptr, nullptr), "BERT-large");
    test_blocks(plan);
    std::printf("BERT-large: %zu launches with %s arguments\n", plan.launches().size(), large ? "large" : "small");
    expect(!large || plan.launches().size() <= 4, "launches for BERT-large");
  }
  std::vector<StepItem> with_child = items;  // as Child-Tuning_D has it: embeddings and head train in full
  alignas(16) static const uint8_t bits[128] = {};
  for (StepItem& item : with_child) {
    item.masked = false;
    item.keep_threshold = kKeepAll;
    if (item.key.param_index > 5 && item.key.param_index < 390) item.child.bits = bits;
  }
  LaunchPlan of_child(true);
  expect(of_child.build(with_child, nullptr, nullptr), "BERT-large with a child network");
  test_blocks(of_child);
  expect(of_child.launches().size() == 3, "launches of D", static_cast<long long>(of_child.launches().size()));
  std::vector<StepItem> in_codes = with_child;  // small parameters keep their state
  for (StepItem& item : in_codes) item.state = item.numel < 4096 ? StateKind::kComputed : StateKind::kCodes;
  for (bool large : {false, true}) {
    LaunchPlan plan(large);
    expect(plan.build(in_codes, nullptr, nullptr), "BERT-large with 8-bit state");
    test_blocks(plan);
    expect(!large || plan.launches().size() <= 5, "launches with 8-bit state", plan.launches().size());
  }
  DevicePlan counted;
  const int64_t bytes = counted.build(items, {DeviceGroup{}}, {nullptr, nullptr});
  expect(counted.constants_tables().size() + 2 <= 4, "launches for BERT-large where the GPU counts");
  expect(bytes < 100 * 394 + 8, "memory where the GPU counts", bytes);
  // Each of these has more than a third of the blocks that a launch may have.
  LaunchPlan plan(true);
  const StepItem huge = imagined(3ll << 41);
  expect(plan.build({huge, huge, huge}, nullptr, nullptr) && plan.launches().size() == 2, "a launch's blocks");
  test_blocks(plan);
}

// One misaligned stream goes without vectors; the others keep them. Runs that begin anywhere go without any.
static void test_vectors() {
  const auto vectors = [](const StepItem& item) {
    LaunchPlan plan(false);
    plan.build({item}, nullptr, nullptr);
    int found = -1;
    visit_table(plan.launches()[0].kind, plan.argument(0),
                [&](const auto& table, auto) { found = table.items[0].vectors; });
    return found;
  };
  expect(vectors(imagined(8)) == kAllVectors, "vectors of all streams");
  for (int stream : {kParam, kGrad, kExpAvg, kExpAvgSq}) {
    StepItem item = imagined(8);
    item.data[stream] = reinterpret_cast<void*>(uintptr_t{4096 + 4});
    expect(vectors(item) == (kAllVectors & ~(1 << stream)), "vectors where they are aligned", stream);
  }
  expect(vectors(imagined(16, {0, 6, 128})) == 0, "vectors of runs that begin anywhere");
  StepItem half = imagined(8);
  half.dtype = DType::kBFloat16;
  half.data[kParam] = half.data[kExpAvg] = reinterpret_cast<void*>(uintptr_t{4096 + 8});
  expect(vectors(half) == (kAllVectors & ~(1 << kExpAvg)), "vectors of four 16-bit weights have 8 bytes");
  StepItem codes = imagined(8);
  codes.state = StateKind::kCodes;
  codes.data[kExpAvg] = reinterpret_cast<void*>(uintptr_t{4096 + 4});
  codes.data[kExpAvgSq] = reinterpret_cast<void*>(uintptr_t{4096 + 2});
  expect(vectors(codes) == (kAllVectors & ~(1 << kExpAvgSq)), "vectors of four codes have 4 bytes");
  codes.state = StateKind::kBFloat16;
  codes.data[kExpAvgSq] = reinterpret_cast<void*>(uintptr_t{4096 + 8});
  expect(vectors(codes) == (kAllVectors & ~(1 << kExpAvg)), "vectors of four bfloat16 values have 8 bytes");
}

static void test_refusals() {
  const StepItem strided = Arrays<float>(8, 3).item(false, false, {});
  const int64_t most = int64_t{0x7FFFFFFF} * kChunkTiles * kTile;
  const StepItem most_tiny_runs = imagined(int64_t{0x7FFFFFFF} * kChunkTiles, {0, 1, 128});
  expect(refusal(strided) == Refusal::kStrided, "a strided array is refused");
  expect(refusal(imagined(most)) == Refusal::kNone, "the most elements");
  expect(refusal(imagined(most + 1)) == Refusal::kTooLarge, "more than the most elements");
  expect(refusal(imagined(INT64_MAX)) == Refusal::kTooLarge, "far too many elements");
  expect(refusal(most_tiny_runs) == Refusal::kNone, "the most runs");
  expect(refusal(imagined(INT64_MAX, {0, 1, 128})) == Refusal::kTooLarge, "far too many runs");
  alignas(16) static const uint8_t bits[2 * 128] = {};
  StepItem child = imagined(8);
  child.child.bits = bits;
  expect(refusal(child) == Refusal::kNone, "a child network");
  child.child.bits = bits + 8;
  expect(refusal(child) == Refusal::kMisaligned, "a mask that is not aligned");
  StepItem codes = imagined(256, {128, 256, 0});
  codes.state = StateKind::kCodes;
  expect(refusal(codes) == Refusal::kNone, "codes");
  codes.slice.offset = 127;
  expect(refusal(codes) == Refusal::kNotRounded, "codes whose run begins within a mask block");
  codes.slice = {0, 128, 512};
  expect(refusal(codes) == Refusal::kNotRounded, "codes of two runs");
  codes.slice = {};
  codes.dtype = DType::kFloat64;
  expect(refusal(codes) == Refusal::kNotRounded, "codes of float64");
  LaunchPlan plan(true);
  expect(!plan.build({imagined(8), strided}, nullptr, nullptr) && plan.launches().empty(), "no plan with a refusal");
  expect(plan.build({}, nullptr, nullptr) && plan.launches().empty(), "nothing to do");
}

static void test_kernel_names() {
  std::set<std::string> names;
  for (int n = 0; n < kKinds; ++n) {
    const Kind kind = kind_of_number(n);
    expect(kind_number(kind) == n, "a kernel's number", n);
    expect(kind.dtype != DType::kFloat64 || kind.storage != Storage::kRounded, "float64 is not rounded", n);
    names.insert(kernel_name(kind));
  }
  const auto name = [](DType dtype, Trained trained, Storage storage, bool large) {
    return kernel_name({dtype, trained, storage, large});
  };
  expect(name(DType::kFloat64, Trained::kAll, Storage::kPlain, false) == "step_float64_small", "a plain kernel");
  expect(name(DType::kFloat16, Trained::kMasked, Storage::kAmsgrad, true) == "step_float16_masked_amsgrad_large",
         "a kernel with amsgrad");
  expect(name(DType::kBFloat16, Trained::kChild, Storage::kRounded, true) == "step_bfloat16_child_rounded_large",
         "a kernel that rounds");
  expect(names.size() == kKinds, "every kernel has a name of its own");
}

void test_cuda_plan() {
  for (int64_t n : {1, 3, 127, 128, 129, 256, 4097, 8192, 8193, 70001}) {
    for (uint64_t offset : {0ull, 1ull, 127ull, 128ull, (1ull << 33) + 77}) test_coverage(n, {offset, 0, 0});
  }
  for (const MaskSlice& slice :
       {MaskSlice{77, 43, 1000}, {0, 200, 1000}, {384, 128, 1024}, {(1ull << 33) + 1, 257, 1000}, {0, 1, 3}}) {
    for (int64_t runs : {1, 2, 31, 32, 33, 500}) test_coverage(runs * slice.run, slice);
  }
  test_launches();
  test_vectors();
  test_refusals();
  test_kernel_names();
}
