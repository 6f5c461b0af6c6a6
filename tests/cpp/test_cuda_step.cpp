// Unit tests of cuda/step_kernel.h: in loops on the CPU it gives the bits of the CPU's step. Called by test_core.cpp.
#include <deque>

#include "emulated_gpu.h"
#include "test_helpers.h"

// A parameter whose arrays begin `shift` elements after where memory was allocated.
template <class P>
struct Shifted {
  Arrays<P> arrays;
  int64_t shift;

  Shifted(int64_t n, int64_t s) : arrays(n + s, 1), shift(s) {}

  StepItem item(bool masked, bool amsgrad, MaskSlice slice) {
    StepItem it = arrays.item(masked, amsgrad, slice);
    it.numel -= shift;
    it.data[kParam] = arrays.param.data() + shift;
    it.data[kGrad] = arrays.grad.data() + shift;
    for (int k = 0; k < (amsgrad ? 3 : 2); ++k) it.data[kExpAvg + k] = arrays.state[k].data() + shift;
    return it;
  }
};

template <class P>
static void expect_same(const Arrays<P>& a, const Arrays<P>& b, const char* what, int64_t n) {
  expect(same_bytes(a.param, b.param), what, n);
  for (int k = 0; k < 3; ++k) expect(same_bytes(a.state[k], b.state[k]), what, n);
}

template <class P>
static void test_step(bool masked, bool amsgrad, MaskSlice slice, int64_t n, int64_t shift) {
  Shifted<P> cpu(n, shift), gpu(n, shift);
  step_cpu({cpu.item(masked, amsgrad, slice)}, 1);
  LaunchPlan plan(true);
  expect(plan.build({gpu.item(masked, amsgrad, slice)}, nullptr, nullptr), "a plan");
  emulate(plan);
  expect_same(gpu.arrays, cpu.arrays, "a GPU's step equals the CPU's", n);
}

static const MaskSlice kSlices[] = {
    {},                             // whole
    {1000003, 0, 0},                // one run, which begins anywhere
    {(1ull << 35) - 64, 0, 0},      // one run, within which elements pass 2^35
    {(1ull << 33) + 4, 512, 4096},  // runs that suit vectors, but begin within mask blocks
    {384, 128, 1024},               // runs of one mask block
    {77, 43, 1000},                 // short runs that begin anywhere
    {0, 200, 1000},                 // runs of which some need a tile more than the first
};

template <class P>
static void test_steps(bool masked, bool amsgrad) {
  for (const MaskSlice& slice : kSlices) {
    for (int64_t n : {0, 1, 3, 127, 128, 129, 4097, 70001}) {
      const int64_t whole_runs = slice.run == 0 ? n : (n + slice.run - 1) / slice.run * slice.run;
      for (int64_t shift : {0, 1}) test_step<P>(masked, amsgrad, slice, whole_runs, shift);
    }
  }
}

// Tensors of every kind in one plan, of many groups and step counts, in several launches.
static void test_many_tensors(bool large) {
  std::deque<Arrays<float>> floats[2];
  std::deque<Arrays<double>> doubles[2];
  std::deque<Arrays<BFloat16>> brains[2];
  std::vector<StepItem> items[2];
  for (int side = 0; side < 2; ++side) {
    for (int i = 0; i < 2000; ++i) {
      const auto add = [&](auto& arrays) {
        arrays.emplace_back(i * 7 % 300, 1);
        StepItem item = arrays.back().item(i % 4 < 2, i % 5 == 0, {});
        item.key = {1u + i % 3, 1u + i % 70, static_cast<uint32_t>(i)};
        const HyperParams h{1e-3, 0.9, 0.99, 1e-6, 0.1, 1.0, share_of(item), i % 3 == 0};
        item.constants = step_constants(h, item.key.step);
        items[side].push_back(item);
      };
      i % 3 == 0 ? add(floats[side]) : i % 3 == 1 ? add(doubles[side]) : add(brains[side]);
    }
  }
  LaunchPlan plan(large);
  step_cpu(items[0], 1);
  expect(plan.build(items[1], nullptr, nullptr), "a plan of many tensors");
  emulate(plan);
  for (size_t i = 0; i < floats[0].size(); ++i) expect_same(floats[1][i], floats[0][i], "many tensors: float32", i);
  for (size_t i = 0; i < doubles[0].size(); ++i) expect_same(doubles[1][i], doubles[0][i], "many tensors: float64", i);
  for (size_t i = 0; i < brains[0].size(); ++i) expect_same(brains[1][i], brains[0][i], "many tensors: bfloat16", i);
}

void test_cuda_steps() {
  for (bool masked : {false, true}) {
    for (bool amsgrad : {false, true}) {
      test_steps<float>(masked, amsgrad);
      test_steps<double>(masked, amsgrad);
      test_steps<BFloat16>(masked, amsgrad);
      test_steps<Float16>(masked, amsgrad);
    }
  }
  test_many_tensors(false);
  test_many_tensors(true);
  std::printf("GPU in loops: done\n");
}
