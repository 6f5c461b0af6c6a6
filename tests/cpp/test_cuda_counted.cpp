// Unit tests of cuda/device_plan.h: steps that the GPU counts, in loops on the CPU, give the bits of those that the
// host counts, whichever numbers are on the device. Called by test_core.cpp.
#include <deque>
#include <memory>

#include "emulated_gpu.h"
#include "test_helpers.h"

namespace {

struct Case {
  const char* name;
  float grad_scale;      // 0: none
  float found_inf;       // looked at if there is a scale
  double max_grad_norm;  // of every second group; 0: none
  int lr_bits;           // 0: on the host
};

// The factor that childtune_fast computes on the host from scale and norm.
double host_factor(const Case& c, bool clips, double squares) {
  const double factor = c.grad_scale == 0 ? -1.0 : -1.0 / static_cast<double>(c.grad_scale);
  return clips ? factor * clip_factor(c.max_grad_norm, squares, factor) : factor;
}

// Parameters of many groups, with state. Two models with the same arguments are equal.
struct Model {
  std::deque<Arrays<float>> floats;
  std::deque<Arrays<double>> doubles;
  std::deque<Arrays<BFloat16>> brains;
  std::vector<StepItem> items;
  std::vector<double> counters;
  std::vector<HyperParams> hypers;

  Model(int tensors, int groups, uint32_t index_stride) : counters(tensors) {
    const int per_group = (tensors + groups - 1) / groups;
    for (int i = 0; i < tensors; ++i) {
      const int64_t numel = i == 3 ? 300001 : i == 4 ? 0 : 1 + i * 37 % 2500;
      const bool masked = i % 4 < 2;
      if (i % 3 == 0) add(floats, numel, masked, i);
      if (i % 3 == 1) add(doubles, numel, masked, i);
      if (i % 3 == 2) add(brains, numel, masked, i);
      StepItem& item = items.back();
      item.group = static_cast<uint32_t>(i / per_group);
      // The norm must be summed in the order of the parameters' numbers in the optimizer: here, from the last on.
      item.key = {9, 0, static_cast<uint32_t>(tensors - i) * index_stride};
      counters[i] = i % 7 == 0 ? 70000 : i % 5;
    }
    for (int g = 0; g < groups; ++g) {
      hypers.push_back({1e-3 * (1 + g), 0.9, 0.999 - 1e-3 * g, 1e-8, 0.1, -1.0, 1.0, g % 3 == 1});
    }
  }

  template <class P>
  void add(std::deque<Arrays<P>>& to, int64_t numel, bool masked, int i) {
    to.emplace_back(numel, 1);
    items.push_back(to.back().item(masked, i % 5 == 0, {}));
  }

  // The hyper-parameters of a parameter's group, with the parameter's own keep_share: a group here has masked
  // parameters and others, which a StepGroup has not.
  HyperParams hyper(const StepItem& item) const {
    HyperParams h = hypers[item.group];
    h.keep_share = share_of(item);
    return h;
  }
};

void step_on_host(Model* m, const Case& c) {
  std::vector<StepItem> ordered(m->items.rbegin(), m->items.rend());
  const double squares = sum_of(sums_of_squares_cpu(ordered, 1));
  for (size_t i = 0; i < m->items.size(); ++i) {
    StepItem& item = m->items[i];
    HyperParams h = m->hyper(item);
    if (c.lr_bits == 32) h.lr = static_cast<double>(static_cast<float>(h.lr));
    h.grad_factor = host_factor(c, c.max_grad_norm > 0 && item.group % 2 == 0, squares);
    item.key.step = static_cast<uint32_t>(m->counters[i]) + 1;
    item.constants = step_constants(h, item.key.step);
    m->counters[i] = item.key.step;
  }
  step_cpu(m->items, 1);
}

// Makes a group on the device for each run of parameters that have one group and one keep_share.
void step_on_device(Model* m, const Case& c, DevicePlan* prelude, LaunchPlan* plan) {
  std::vector<DeviceGroup> groups;
  std::deque<float> lr_floats;
  std::deque<double> lr_doubles;
  std::vector<StepItem> items = m->items;
  for (size_t i = 0; i < items.size(); ++i) {
    const uint32_t group = items[i].group;
    const HyperParams h = m->hyper(items[i]);
    const bool clips = c.max_grad_norm > 0 && group % 2 == 0;
    DeviceGroup made{h, nullptr, false, clips, false, c.max_grad_norm};
    if (c.lr_bits != 0) {
      lr_floats.push_back(static_cast<float>(h.lr));
      lr_doubles.push_back(h.lr);
      made.hyper.lr = 12345;  // wrong, and must not be read
      made.lr_is_double = c.lr_bits == 64;
      made.lr = made.lr_is_double ? static_cast<const void*>(&lr_doubles.back()) : &lr_floats.back();
    }
    const bool as_before = !groups.empty() && i > 0 && group == m->items[i - 1].group && c.lr_bits == 0 &&
                           items[i].keep_threshold == items[i - 1].keep_threshold;
    if (!as_before) groups.push_back(made);
    items[i].group = static_cast<uint32_t>(groups.size() - 1);
    items[i].counter = &m->counters[i];
    items[i].constants = {};
    items[i].key.step = 0;
  }
  const bool scaled = c.grad_scale != 0;
  const DeviceScaler scaler{scaled ? &c.grad_scale : nullptr, scaled ? &c.found_inf : nullptr};
  const int64_t bytes = prelude->build(items, groups, scaler);
  const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(bytes) / sizeof(double)]);
  prelude->place(memory.get());
  emulate(*prelude);
  expect(plan->build(items, prelude->constants(), scaler.found_inf), c.name);
  emulate(*plan);
}

template <class P>
void expect_same(const std::deque<Arrays<P>>& a, const std::deque<Arrays<P>>& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i) {
    expect(same_bytes(a[i].param, b[i].param), what, static_cast<long long>(i));
    for (int k = 0; k < 3; ++k) expect(same_bytes(a[i].state[k], b[i].state[k]), what, static_cast<long long>(i));
  }
}

}  // namespace

void test_cuda_counted_steps() {
  const Case cases[] = {
      {"steps that the GPU counts", 0, 0, 0, 0},
      {"a learning rate on the device, float32", 0, 0, 0, 32},
      {"a learning rate on the device, float64", 0, 0, 0, 64},
      {"a GradScaler's scale on the device", 3.0f, 0, 0, 0},
      {"a step that is not taken", 65536.0f, 1, 0, 0},
      {"a step that is not taken, for a NaN", 65536.0f, NAN, 0, 0},
      {"clipping on the device", 0, 0, 0.25, 0},
      {"clipping that does not clip", 0, 0, 1e9, 0},
      {"everything on the device", 1024.0f, 0, 1e-3, 64},
  };
  DevicePlan prelude;
  LaunchPlan plan(true);
  for (const Case& c : cases) {
    for (int tensors : {1, 6, 700}) {
      for (int groups : {1, 3, 40}) {
        Model host(tensors, groups, 3), device(tensors, groups, 3);
        for (int step = 0; step < 2; ++step) {
          if (!(c.grad_scale != 0 && c.found_inf != 0)) step_on_host(&host, c);
          step_on_device(&device, c, &prelude, &plan);
        }
        expect_same(device.floats, host.floats, c.name);
        expect_same(device.doubles, host.doubles, c.name);
        expect_same(device.brains, host.brains, c.name);
        expect(same_bytes(device.counters, host.counters), c.name, tensors);
      }
    }
  }
  expect(prelude.build({}, {}, {nullptr, nullptr}) >= 0 && prelude.constants_tables().empty(), "nothing to count");
  std::printf("steps that the GPU counts: done\n");
}
