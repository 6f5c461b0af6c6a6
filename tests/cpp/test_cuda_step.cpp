// Unit tests of cuda/step_kernel.h: in loops on the CPU it gives the bits of the CPU's step. Called by test_core.cpp.
#include <deque>

#include "emulated_gpu.h"
#include "test_helpers.h"

// A parameter some of whose arrays begin one element after where memory was allocated: those whose bits are set in
// `shifted`.
template <class P>
struct Shifted {
  Arrays<P> arrays;
  int shifted;

  Shifted(int64_t n, int s) : arrays(n + (s != 0 ? 1 : 0), 1), shifted(s) {}

  StepItem item(bool masked, bool amsgrad, MaskSlice slice) {
    StepItem it = arrays.item(masked, amsgrad, slice);
    it.numel -= shifted != 0 ? 1 : 0;
    it.data[kParam] = arrays.param.data() + shift(kParam);
    it.data[kGrad] = arrays.grad.data() + shift(kGrad);
    for (int k = 0; k < (amsgrad ? 3 : 2); ++k) it.data[kExpAvg + k] = arrays.state[k].data() + shift(kExpAvg + k);
    return it;
  }

  int shift(int stream) const { return shifted >> stream & 1; }
};

template <class P>
static void expect_same(const Arrays<P>& a, const Arrays<P>& b, const char* what, int64_t n) {
  expect(same_bytes(a.param, b.param), what, n);
  for (int k = 0; k < 3; ++k) expect(same_bytes(a.state[k], b.state[k]), what, n);
}

template <class P>
static void test_step(bool masked, bool amsgrad, MaskSlice slice, int64_t n, int shifted) {
  Shifted<P> cpu(n, shifted), gpu(n, shifted);
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
      for (int shifted : {0, int{kAllVectors}}) test_step<P>(masked, amsgrad, slice, whole_runs, shifted);
    }
  }
}

// Every set of misaligned arrays.
template <class P>
static void test_misaligned(bool masked) {
  for (int shifted = 0; shifted <= kAllVectors; ++shifted) test_step<P>(masked, true, {}, 777, shifted);
}

// Moments of zero, of either sign, in whole quads and in parts of them; and a second moment that is divided by 1. Both
// take another way on a GPU.
template <class P>
static void test_zeros(bool amsgrad, double eps, bool published_code) {
  using T = typename ComputeType<P>::type;
  Arrays<P> arrays[2] = {{3000, 1}, {3000, 1}};
  std::vector<StepItem> items;
  for (Arrays<P>& a : arrays) {
    for (size_t i = 0; i < 3000; ++i) {
      if (i % 1000 < 300 || i % 3 == 0) store(a.grad[i], i % 2 == 0 ? T(0) : T(-0.0));
      for (int k = 0; k < 3; ++k) {
        if (i % 1000 < 300 || i % 5 == 0) a.state[k][i] = i % 7 == 0 ? T(-0.0) : T(0);
      }
      if (i == 50) a.state[0][i] = bit_cast<float>(1u);  // the only one of its quad
      if (i == 60) a.state[amsgrad ? 2 : 1][i] = bit_cast<float>(1u);
    }
    StepItem item = a.item(false, amsgrad, {});
    item.constants = step_constants({1e-2, 0.9, 0.999, eps, 0.1, 1.0, 1.0, published_code}, 3);
    items.push_back(item);
  }
  step_cpu({items[0]}, 1);
  LaunchPlan plan(true);
  plan.build({items[1]}, nullptr, nullptr);
  emulate(plan);
  expect_same(arrays[1], arrays[0], "a step of zeros", published_code);
}

template <class P>
static void test_ways() {
  for (bool masked : {false, true}) test_misaligned<P>(masked);
  for (bool amsgrad : {false, true}) {
    for (double eps : {1e-8, 0.0}) {
      for (bool published_code : {false, true}) test_zeros<P>(amsgrad, eps, published_code);
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
  test_ways<float>();
  test_ways<double>();
  test_ways<BFloat16>();
  test_ways<Float16>();
  test_many_tensors(false);
  test_many_tensors(true);
  std::printf("GPU in loops: done\n");
}
