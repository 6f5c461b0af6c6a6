// Reads the groups of a step, which childtune_fast/ops/step_group.py defines, and makes StepItems of them. Included by
// bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <vector>

#include "core/step_item.h"
#include "cpu/loops.h"
#include "cuda/device_constants.h"
#include "python/step_items.h"
#include "python/tensor_view.h"
#include "python/written_memory.h"

namespace childtune {
namespace {

// Who counts the steps: the host, or the GPU that takes them, which then computes the constants too.
enum class Counter { kHost, kGpu };

// One of a group's lists: `name` must hold a tensor for each parameter. It is read when Python code may run no more,
// and keeps the tensors alive until the step is done: meanwhile another thread may clear the list.
struct TensorList {
  py::tuple tensors;
  const char* name;

  TensorList(const py::handle& group, const char* name_) : name(name_) {
    const py::object list = group.attr(name);
    if (!PyList_Check(list.ptr())) throw py::type_error(std::string(name) + " must be a list");
    tensors = py::reinterpret_steal<py::tuple>(PyList_AsTuple(list.ptr()));
    if (!tensors) throw py::error_already_set();
  }

  size_t size() const { return static_cast<size_t>(PyTuple_GET_SIZE(tensors.ptr())); }

  PyObject* entry(size_t i) const { return PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)); }

  TensorView at(size_t i) const {
    if (i >= size()) refuse(std::string(name) + " must have an entry for each parameter");
    return view_tensor(entry(i));
  }

  // Asks for the memory of tensors that come after entry `i`: a thousand small ones do not fit in a fast cache.
  void fetch_after(size_t i) const {
    if (i + 4 < size()) CHILDTUNE_PREFETCH(entry(i + 4));
    if (i + 2 < size()) fetch_tensor(entry(i + 2));
  }
};

HyperParams hyper_params(const py::handle& group) {
  const auto number = [&](const char* name) { return group.attr(name).cast<double>(); };
  return {number("lr"),
          number("beta1"),
          number("beta2"),
          number("eps"),
          number("weight_decay"),
          number("grad_factor"),
          number("keep_threshold") / kKeepAll,
          group.attr("published_code").cast<bool>()};
}

MaskSlice mask_slice(const py::handle& entry) {
  const auto numbers = entry.cast<py::tuple>();
  if (numbers.size() != 3) refuse("a slice must have offset, run and stride");
  return {numbers[0].cast<uint64_t>(), numbers[1].cast<int64_t>(), numbers[2].cast<uint64_t>()};
}

// How the state of a group's parameters is stored, by the word of StepGroup.state.
StateKind state_kind(const std::string& word) {
  if (word == "float32") return StateKind::kComputed;
  if (word == "bfloat16") return StateKind::kBFloat16;
  if (word == "8bit") return StateKind::kCodes;
  refuse("state must be 'float32', 'bfloat16' or '8bit'");
}

// What a group holds. Reading it may run any Python code, as numbers and attributes can be objects of the user's; the
// tensors themselves are looked at later, when all groups have been read.
struct Group {
  TensorList params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, child_bits, child_offsets;
  TensorList scales[kAverages];
  std::vector<uint32_t> indices;
  std::vector<int64_t> child_counts;
  std::vector<MaskSlice> slices;  // empty: every parameter is whole
  StateKind state;
  bool amsgrad, decay_outside, stochastic;
  uint32_t keep_threshold;
  uint64_t seed;
  HyperParams hyper;
  py::object lr_on_device;
  DeviceGroup on_device{};  // with Counter::kGpu

  Group(const py::handle& group, Counter counter)
      : params(group, "params"),
        grads(group, "grads"),
        exp_avgs(group, "exp_avgs"),
        exp_avg_sqs(group, "exp_avg_sqs"),
        max_exp_avg_sqs(group, "max_exp_avg_sqs"),
        steps(group, "steps"),
        child_bits(group, "child_bits"),
        child_offsets(group, "child_offsets"),
        scales{{group, "exp_avg_scales"}, {group, "exp_avg_sq_scales"}, {group, "max_exp_avg_sq_scales"}},
        state(state_kind(group.attr("state").cast<std::string>())),
        amsgrad(group.attr("amsgrad").cast<bool>()),
        decay_outside(group.attr("decay_outside").cast<bool>()),
        stochastic(group.attr("stochastic").cast<bool>()),
        keep_threshold(group.attr("keep_threshold").cast<uint32_t>()),
        seed(group.attr("seed").cast<uint64_t>()),
        hyper(hyper_params(group)) {
    for (const py::handle& index : py::tuple(group.attr("indices"))) indices.push_back(index.cast<uint32_t>());
    for (const py::handle& count : py::tuple(group.attr("child_counts"))) child_counts.push_back(count.cast<int64_t>());
    const py::object places = group.attr("slices");
    if (!places.is_none()) {
      for (const py::handle& place : py::tuple(places)) slices.push_back(mask_slice(place));
      if (slices.size() != params.size()) refuse("slices must have an entry for each parameter");
    }
    if (indices.size() < params.size() || (masked() && child_counts.size() < params.size()))
      refuse("indices and child_counts must have an entry for each parameter");
    if (counter == Counter::kGpu) {
      const py::object max_grad_norm = group.attr("max_grad_norm");
      lr_on_device = group.attr("lr_on_device");
      on_device.hyper = hyper;
      on_device.clips = !max_grad_norm.is_none();
      on_device.child_norm = group.attr("child_norm").cast<bool>();
      if (on_device.clips) on_device.max_grad_norm = max_grad_norm.cast<double>();
    }
  }

  bool masked() const { return child_bits.size() > 0; }

  void count_writes() const {
    const auto count = static_cast<Py_ssize_t>(params.size());  // which add_items has looked at, in each list
    for (const TensorList* written : {&params, &exp_avgs, &exp_avg_sqs}) {
      childtune::count_writes(written->tensors.ptr(), count);
    }
    if (amsgrad) childtune::count_writes(max_exp_avg_sqs.tensors.ptr(), count);
    for (const TensorList& of_average : scales) {
      if (of_average.size() > 0) childtune::count_writes(of_average.tensors.ptr(), count);
    }
  }
};

DeviceGroup device_group(const Group& group, int device) {
  DeviceGroup result = group.on_device;
  if (!group.lr_on_device.is_none()) {
    const TensorView view = view_tensor(group.lr_on_device.ptr());
    result.lr = number_on(device, view, "lr", true);
    result.lr_is_double = view.bits == 64;
  }
  return result;
}

// Sets what a step that rounds stochastically needs; the item's arrays and slice must be set before.
void set_rounding(const Group& group, size_t i, int device, StepItem* item) {
  if (item->state != group.state) refuse("the state must be stored as its group says");
  item->stochastic = group.stochastic;
  if (!is_rounded(*item)) return;
  if (item->slice.offset % kMaskBlock != 0 || (item->slice.run > 0 && item->slice.run != item->numel))
    refuse("a slice that is rounded stochastically must be one run, which begins at a multiple of 128");
  if (item->state != StateKind::kCodes) return;
  for (int average = 0; average < kAverages - !group.amsgrad; ++average) {
    item->scales[average] = code_scales(group.scales[average].at(i), item->numel, device);
  }
}

void add_items(const Group& group, int device, Counter counter, Workspace* w) {
  if (counter == Counter::kGpu) w->groups.push_back(device_group(group, device));
  uint64_t constants_step = 0;  // parameters of a group mostly share their step count, so its constants too
  AdamWConstants<double> constants{};
  for (size_t i = 0; i < group.params.size(); ++i) {
    for (const TensorList* list : {&group.params, &group.grads, &group.exp_avgs, &group.exp_avg_sqs, &group.steps}) {
      list->fetch_after(i);
    }
    TensorView views[kStreams] = {
        group.params.at(i), group.grads.at(i), group.exp_avgs.at(i), group.exp_avg_sqs.at(i), {}};
    if (group.amsgrad) views[kMaxExpAvgSq] = group.max_exp_avg_sqs.at(i);
    StepItem item{};
    if (group.masked()) {
      item.child = packed_mask(group.child_bits.at(i), group.child_offsets.at(i), group.child_counts[i],
                               views[kParam].numel(), device);
    }
    set_arrays(views, group.amsgrad ? 5 : 4, device, w, &item);
    if (counter == Counter::kGpu) {
      item.counter = count_on(device, group.steps.at(i));
      item.group = static_cast<uint32_t>(w->groups.size() - 1);
    } else if (const uint64_t step = next_step(group.steps.at(i), w); step != constants_step) {
      constants = step_constants(group.hyper, step);
      constants_step = step;
    }
    item.constants = constants;
    item.masked = group.keep_threshold < kKeepAll;
    item.keep_threshold = group.keep_threshold;
    item.key = {group.seed, static_cast<uint32_t>(constants_step), group.indices[i]};
    if (!group.slices.empty()) item.slice = group.slices[i];
    if (item.slice.run < 0 || (item.slice.run > 0 && item.numel % item.slice.run != 0))
      refuse("a slice must hold whole runs");
    item.decay_outside = group.decay_outside;
    set_rounding(group, i, device, &item);
    w->items.push_back(item);
  }
}

// A step as Python asks for it: the groups, which it keeps alive, and the items made of them. `checked` is what an
// earlier step of these groups returned: which memory it wrote.
class Step {
 public:
  Step(const py::list& groups, int device, Counter counter, uint64_t checked) : items_(workspace()) {
    for (const py::handle& group : py::tuple(groups)) groups_.emplace_back(group, counter);
    for (const Group& group : groups_) add_items(group, device, counter, &items_);
    items_.place_layouts();
    written_ = digest_of_written(items_.items, items_.step_counters);
    if (written_ != checked && !lie_apart(items_.items, items_.step_counters)) throw UnverifiedMemory{written_};
  }

  const Workspace& items() const { return items_; }

  // Says that the step is taken, which clears `undo`, in one call with it: whatever a signal's handler raises when that
  // has returned, nothing of the step may be undone any more. Returns which memory the step wrote.
  uint64_t taken(const py::object& undo) const {
    if (!undo.is_none()) PyDict_Clear(undo.ptr());
    for (const Group& group : groups_) group.count_writes();
    return written_;
  }

 private:
  Call call_;
  Workspace& items_;
  std::deque<Group> groups_;  // Groups stay where they are
  uint64_t written_;
};

void check_undo(const py::object& undo) {
  if (!undo.is_none() && !PyDict_Check(undo.ptr())) throw py::type_error("undo must be a dict");
}

}  // namespace
}  // namespace childtune
