// Unit tests of cuda/child_kernel.h: in loops on the CPU it gives the bits of the CPU's compact step, and it stays
// within its arrays whatever the mask holds. Called by test_core.cpp.
#include <deque>

#include "emulated_gpu.h"
#include "test_helpers.h"

namespace {

// A parameter with a child network. Its arrays begin `shift` elements after where memory was allocated.
template <class P>
struct Child {
  ChildMask mask;
  Arrays<P> arrays;
  int64_t shift;

  Child(int64_t n, int64_t s, uint32_t percent) : mask(n, percent), arrays(n + s, 1), shift(s) {
    arrays.keep_child(mask.count());
  }

  StepItem item(bool amsgrad, bool decay_outside) {
    StepItem item = arrays.item(false, amsgrad, {});
    item.numel -= shift;
    item.data[kParam] = arrays.param.data() + shift;
    item.data[kGrad] = arrays.grad.data() + shift;
    item.child = mask.packed();
    item.decay_outside = decay_outside;
    return item;
  }
};

template <class P>
void expect_same(const Child<P>& a, const Child<P>& b, const char* what, int64_t detail) {
  expect(same_bytes(a.arrays.param, b.arrays.param), what, detail);
  for (int k = 0; k < 3; ++k) expect(same_bytes(a.arrays.state[k], b.arrays.state[k]), what, detail);
}

template <class P>
void test_steps(bool amsgrad, bool decay_outside) {
  LaunchPlan plan(true);
  for (uint32_t percent : {0u, 1u, 30u, 99u, 100u}) {
    for (int64_t n : {1, 3, 4, 31, 32, 127, 128, 129, 1000, 1023, 1024, 1025, 8191, 8192, 8193, 30001}) {
      for (int64_t shift : {0, 1}) {
        Child<P> cpu(n, shift, percent), gpu(n, shift, percent);
        step_cpu({cpu.item(amsgrad, decay_outside)}, 1);
        expect(plan.build({gpu.item(amsgrad, decay_outside)}, nullptr, nullptr), "a plan of a child network");
        expect(plan.launches().size() == 1 && plan.launches()[0].kind.trained == Trained::kChild, "one launch");
        emulate(plan);
        expect_same(gpu, cpu, "a child network's step on a GPU equals the CPU's", n);
      }
    }
  }
}

// Weights outside the child network keep their bits, also those of a NaN.
void test_bits_outside() {
  Child<float> child(5000, 0, 30);
  for (uint32_t i = 0; i < 5000; ++i) child.arrays.param[i] = bit_cast<float>(0x7F800001u + 977 * i);
  const std::vector<float> before = child.arrays.param;
  LaunchPlan plan(true);
  plan.build({child.item(false, false)}, nullptr, nullptr);
  emulate(plan);
  for (int64_t i = 0; i < 5000; ++i) {
    if (in_child(child.mask.bits.data(), i)) continue;
    expect(memcmp(&child.arrays.param[i], &before[i], sizeof(float)) == 0, "a weight outside keeps its bits", i);
  }
}

// No mask makes a step read or write beyond its arrays: the sanitizers watch.
void test_damaged_masks() {
  LaunchPlan plan(true);
  const auto step = [&](Child<float>* child, PackedMask mask) {
    StepItem item = child->item(true, true);
    item.child = mask;
    plan.build({item}, nullptr, nullptr);
    emulate(plan);
  };
  for (int64_t n : {1, 100, 1024, 5000}) {
    Child<float> child(n, 0, 30);
    PackedMask fewer = child.mask.packed();
    fewer.count = fewer.count / 2;
    step(&child, fewer);
    for (int64_t wrong : {INT64_MAX, INT64_MIN, int64_t{-1}, child.mask.count(), child.mask.count() + 1}) {
      std::vector<int64_t> offsets(child.mask.offsets.size(), wrong);
      step(&child, {child.mask.bits.data(), offsets.data(), child.mask.count()});
    }
    Child<float> expected(n, 0, 30), beyond(n, 0, 30);
    for (int64_t i = n; i < 8 * mask_bytes(n); ++i) beyond.mask.bits[i / 8] |= static_cast<uint8_t>(1 << i % 8);
    step(&expected, expected.mask.packed());
    step(&beyond, beyond.mask.packed());
    expect_same(beyond, expected, "bits beyond the weights do not count", n);
    std::fill(child.mask.bits.begin(), child.mask.bits.end(), uint8_t{0xFF});
    step(&child, child.mask.packed());
  }
}

// A child network beside tensors that train in full and tensors with a random mask, counted by the GPU, and clipped.
void test_mixed_steps(bool child_norm) {
  const int tensors = 400;
  const double max_norm = 0.5;
  std::deque<Child<float>> children[2];
  std::deque<Arrays<float>> whole[2];
  std::vector<double> counters[2] = {std::vector<double>(tensors, 4.0), std::vector<double>(tensors, 4.0)};
  std::vector<StepItem> items[2];
  for (int side = 0; side < 2; ++side) {
    for (int i = 0; i < tensors; ++i) {
      const int64_t n = 1 + i * 37 % 2500;
      if (i % 3 == 0) {
        whole[side].emplace_back(n, 1);
        items[side].push_back(whole[side].back().item(i % 2 == 0, i % 5 == 0, {}));
      } else {
        children[side].emplace_back(n, 0, 30);
        items[side].push_back(children[side].back().item(i % 5 == 0, i % 2 == 0));
      }
      StepItem& item = items[side].back();
      item.key = {9, 5, static_cast<uint32_t>(i)};
      item.counter = &counters[side][i];
      item.group = item.masked ? 1 : 0;
    }
  }
  std::vector<StepItem> normed = items[0];
  for (StepItem& item : normed) item.child = child_norm ? item.child : PackedMask{};
  const double squares = sum_of(sums_of_squares_cpu(normed, 1));
  HyperParams h[2];
  std::vector<DeviceGroup> groups;
  for (int g = 0; g < 2; ++g) {
    const double share = g == 1 ? 19661.0 / kKeepAll : 1.0;
    h[g] = {1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0, share, false};
    groups.push_back({h[g], nullptr, false, true, child_norm, max_norm});
    h[g].grad_factor *= clip_factor(max_norm, squares, 1.0);
  }
  for (StepItem& item : items[0]) item.constants = step_constants(h[item.group], 5);
  step_cpu(items[0], 1);
  DevicePlan prelude;
  LaunchPlan plan(true);
  const int64_t bytes = prelude.build(items[1], groups, {nullptr, nullptr});
  std::vector<double> memory(static_cast<size_t>(bytes) / sizeof(double));
  prelude.place(memory.data());
  emulate(prelude);
  expect(plan.build(items[1], prelude.constants(), nullptr), "a plan of everything");
  emulate(plan);
  for (size_t i = 0; i < children[0].size(); ++i) {
    expect_same(children[1][i], children[0][i], "counted steps of a child network", static_cast<long long>(i));
  }
  for (size_t i = 0; i < whole[0].size(); ++i) {
    expect(same_bytes(whole[1][i].param, whole[0][i].param), "beside a child network", static_cast<long long>(i));
  }
}

}  // namespace

void test_cuda_child_steps() {
  for (bool amsgrad : {false, true}) {
    for (bool decay_outside : {false, true}) {
      test_steps<float>(amsgrad, decay_outside);
      test_steps<double>(amsgrad, decay_outside);
      test_steps<BFloat16>(amsgrad, decay_outside);
      test_steps<Float16>(amsgrad, decay_outside);
    }
  }
  test_bits_outside();
  test_damaged_masks();
  test_mixed_steps(false);
  test_mixed_steps(true);
  std::printf("a child network on a GPU: done\n");
}
