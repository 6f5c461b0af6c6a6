// Unit tests of cuda/rounded_kernel.h and cuda/rounded_child_kernel.h: in loops on the CPU they give the bits of a
// plain loop over core's functions. Called by test_core.cpp.
#include <deque>

#include "emulated_gpu.h"
#include "rounded_parameter.h"

namespace {

constexpr StateKind kKindsOfState[] = {StateKind::kComputed, StateKind::kBFloat16, StateKind::kCodes};

template <class P>
void test_step(int64_t n, const RoundedCase& how) {
  RoundedParameter<P> plain(n, how), gpu(n, how);
  LaunchPlan plan(true);
  for (int step = 0; step < 2; ++step) {
    StepItem items[2] = {plain.item(), gpu.item()};
    for (StepItem& item : items) item.key.step += static_cast<uint32_t>(step);
    plain.step_plainly(items[0]);
    expect(plan.build({items[1]}, nullptr, nullptr), "a plan of rounding");
    const bool rounds = how.state != StateKind::kComputed || (how.stochastic && sizeof(P) == 2);
    expect(n == 0 || (plan.launches()[0].kind.storage == Storage::kRounded) == rounds, "the kernel that rounds", n);
    emulate(plan);
  }
  expect_same(gpu, plain, "a GPU's step that rounds equals the plain loop");
}

template <class P>
void test_steps(StateKind state, bool amsgrad, bool stochastic) {
  for (int64_t n : {0, 1, 3, 127, 128, 129, 255, 256, 257, 4097, 8500}) {
    for (int shift : {0, 1}) {
      for (bool masked : {false, true}) {
        for (uint64_t offset : {uint64_t{0}, (uint64_t{1} << 39) - 256}) {
          test_step<P>(n, {state, masked, amsgrad, stochastic, -1, false, offset, shift});
        }
      }
    }
  }
  for (int percent : {0, 1, 30, 99, 100}) {
    for (int64_t n : {1, 4, 127, 129, 1000, 1024, 1025, 8193}) {
      const uint64_t offset = n % 2 == 0 ? 0 : (uint64_t{1} << 39) - 256;
      for (bool decay_outside : {false, true}) {
        test_step<P>(n,
                     {state, false, amsgrad, stochastic, percent, decay_outside, offset, static_cast<int>(n % 3 == 0)});
      }
    }
  }
}

// No mask makes a step read or write beyond its arrays: the sanitizers watch.
void test_damaged_masks() {
  LaunchPlan plan(true);
  const auto step = [&](RoundedParameter<float>* child, PackedMask mask) {
    StepItem item = child->item();
    item.child = mask;
    plan.build({item}, nullptr, nullptr);
    emulate(plan);
  };
  const RoundedCase how{StateKind::kCodes, false, true, false, 30, true, 0, 0};
  for (int64_t n : {1, 100, 1024, 5000}) {
    RoundedParameter<float> child(n, how);
    PackedMask fewer = child.mask.packed();
    fewer.count /= 2;
    step(&child, fewer);
    for (int64_t wrong : {INT64_MAX, INT64_MIN, int64_t{-1}, child.count, child.count + 1}) {
      const std::vector<int64_t> offsets(child.mask.offsets.size(), wrong);
      step(&child, {child.mask.bits.data(), offsets.data(), child.count});
    }
    RoundedParameter<float> expected(n, how), beyond(n, how);
    for (int64_t i = n; i < 8 * mask_bytes(n); ++i) beyond.mask.bits[i / 8] |= static_cast<uint8_t>(1 << i % 8);
    step(&expected, expected.mask.packed());
    step(&beyond, beyond.mask.packed());
    expect_same(beyond, expected, "bits beyond the weights do not count");
    std::fill(child.mask.bits.begin(), child.mask.bits.end(), uint8_t{0xFF});
    step(&child, child.mask.packed());
  }
}

// Tensors of every kind beside those that are stored to nearest, of many groups and step counts, counted by the GPU.
void test_many_tensors(bool large) {
  std::deque<RoundedParameter<float>> floats[2];
  std::deque<RoundedParameter<BFloat16>> brains[2];
  std::vector<double> counters;
  std::vector<DeviceGroup> groups;
  for (int i = 0; i < 600; ++i) counters.push_back(i % 70);
  LaunchPlan plan(large);
  DevicePlan prelude;
  std::vector<StepItem> items;
  for (int side = 0; side < 2; ++side) {
    for (int i = 0; i < 600; ++i) {
      const int percent = i % 3 == 0 ? 40 : -1;
      const RoundedCase how{
          kKindsOfState[i % 7 % 3], i % 4 == 1 && percent < 0, i % 5 == 0, i % 2 == 0, percent, i % 4 == 0, 0, 0};
      const auto add = [&](auto& parameters) {
        parameters.emplace_back(i * 7 % 300, how);
        StepItem item = parameters.back().item();
        item.key = {1u + i % 3, static_cast<uint32_t>(counters[i]) + 1, static_cast<uint32_t>(i)};
        const HyperParams h{1e-3, 0.9, 0.99, 1e-6, 0.1, 1.0, share_of(item), i % 3 == 0};
        item.constants = step_constants(h, item.key.step);
        if (side == 0) return parameters.back().step_plainly(item);
        item.counter = &counters[i];
        item.group = static_cast<uint32_t>(groups.size());
        groups.push_back({h, nullptr, false, false, false, 0});
        items.push_back(item);
      };
      i % 2 == 0 ? add(brains[side]) : add(floats[side]);
    }
  }
  const int64_t bytes = prelude.build(items, groups, {nullptr, nullptr});
  std::vector<double> memory(static_cast<size_t>(bytes) / sizeof(double));
  prelude.place(memory.data());
  emulate(prelude);
  expect(plan.build(items, prelude.constants(), nullptr), "a plan of many tensors that are rounded");
  emulate(plan);
  for (size_t i = 0; i < floats[0].size(); ++i) expect_same(floats[1][i], floats[0][i], "many tensors: float32");
  for (size_t i = 0; i < brains[0].size(); ++i) expect_same(brains[1][i], brains[0][i], "many tensors: bfloat16");
}

}  // namespace

void test_cuda_rounded_steps() {
  for (StateKind state : kKindsOfState) {
    for (bool amsgrad : {false, true}) {
      for (bool stochastic : {false, true}) {
        test_steps<float>(state, amsgrad, stochastic);
        test_steps<BFloat16>(state, amsgrad, stochastic);
        test_steps<Float16>(state, amsgrad, stochastic);
      }
    }
  }
  test_damaged_masks();
  test_many_tensors(false);
  test_many_tensors(true);
  std::printf("rounding on a GPU: done\n");
}
