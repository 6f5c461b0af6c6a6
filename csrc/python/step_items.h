// Turns the groups of a step into StepItems, and checks everything that memory safety rests on. Included by
// bindings.cpp only, so that pybind11's headers are compiled once. The sentences that users see for wrong tensors are
// written in childtune_fast/ops/step_group.py, which also defines the groups.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/step_item.h"
#include "cuda/device_constants.h"
#include "python/tensor_view.h"

namespace py = pybind11;

namespace childtune {
namespace {

// Who counts the steps: the host, or the GPU that takes them, which then computes the constants too.
enum class Counter { kHost, kGpu };

// Kept between steps, so that a step allocates nothing.
struct Workspace {
  std::vector<StepItem> items;
  std::vector<DeviceGroup> groups;   // with Counter::kGpu
  std::vector<void*> step_counters;  // where each item's step count is stored
  std::vector<bool> step_is_double;
  std::vector<int64_t> layouts;        // of arrays that are not contiguous
  std::vector<int64_t> layout_starts;  // of each item in `layouts`, or -1

  void clear() {
    items.clear();
    groups.clear();
    step_counters.clear();
    step_is_double.clear();
    layouts.clear();
    layout_starts.clear();
    forget_views();
  }

  // Growing `layouts` moves it, so pointers into it are set last.
  void place_layouts() {
    for (size_t i = 0; i < items.size(); ++i) {
      items[i].layout = layout_starts[i] < 0 ? nullptr : layouts.data() + layout_starts[i];
    }
  }
};

Workspace& workspace() {
  thread_local Workspace w;
  w.clear();
  return w;
}

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

// Returns the group's list. It must be a list: then the group holds it, so its tensors outlive the step, which the
// items of another iterable need not do.
py::list list_of(const py::handle& group, const char* name) {
  const py::object value = group.attr(name);
  if (!PyList_Check(value.ptr())) throw py::type_error(std::string(name) + " must be a list");
  return py::reinterpret_borrow<py::list>(value);
}

// One of a group's lists: `name` must hold a tensor for each parameter.
struct TensorList {
  py::list list;
  const char* name;

  TensorList(const py::handle& group, const char* name_) : list(list_of(group, name_)), name(name_) {}

  TensorView at(size_t i) const {
    if (i >= list.size()) refuse(std::string(name) + " must have an entry for each parameter");
    return view_tensor(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)));
  }
};

DType param_dtype(const TensorView& t) {
  if (t.is(kCodeFloat, 32)) return DType::kFloat32;
  if (t.is(kCodeFloat, 64)) return DType::kFloat64;
  if (t.is(kCodeBFloat, 16)) return DType::kBFloat16;
  if (t.is(kCodeFloat, 16)) return DType::kFloat16;
  refuse("param must be float32, float64, bfloat16 or float16");
}

bool is_vector_of(const TensorView& t, uint8_t code, uint8_t bits, int64_t numel, int device) {
  return t.is(code, bits) && t.device == device && t.ndim == 1 && t.numel() == numel && t.contiguous() &&
         (numel == 0 || t.data != nullptr);
}

// The bits of a child network's mask, after checking that they are those of `numel` weights, as far as the host can
// read them.
const uint8_t* child_bits(const TensorView& t, int64_t numel, int device) {
  static const uint8_t none = 0;
  if (!is_vector_of(t, kCodeUInt, 8, mask_bytes(numel), device))
    refuse("child_bits must hold 128 bytes on the device of the step for each 1024 weights begun");
  if (numel == 0) return &none;
  const auto* bits = static_cast<const uint8_t*>(t.data);
  if (device == kCpu && numel % 8 != 0 && bits[numel / 8] >> (numel % 8) != 0)
    refuse("child_bits must end with the weights");
  return bits;
}

// A child network's mask, after checking that its offsets count its weights, as far as the host can read them.
PackedMask packed_mask(const TensorView& bits, const TensorView& offsets, int64_t count, int64_t numel, int device) {
  const int64_t blocks = packed_blocks(numel);
  if (!is_vector_of(offsets, kCodeInt, 64, blocks + 1, device))
    refuse(
        "child_offsets must hold an offset on the device of the step for each 1024 weights begun, and the whole count");
  const auto* offset = static_cast<const int64_t*>(offsets.data);
  bool counts = count >= 0 && count <= numel;
  if (device == kCpu) {  // a GPU's kernels check the offsets that they use
    counts = counts && offset[0] == 0 && offset[blocks] == count;
    for (int64_t b = 0; b < blocks; ++b) {
      counts = counts && offset[b] <= offset[b + 1] && offset[b + 1] - offset[b] <= kPackedBlock;
    }
  }
  if (!counts) refuse("child_offsets must count the weights");
  return {child_bits(bits, numel, device), offset, count};
}

// Sets the item's arrays, after checking that all lie on the device with the shape and the dtypes that the kernel
// assumes. item->child must be set before: with a child network, the state must be compact.
void set_arrays(const TensorView* views, int streams, int device, Workspace* w, StepItem* item) {
  const TensorView& param = views[kParam];
  item->dtype = param_dtype(param);
  item->numel = param.numel();
  const uint8_t state_bits = item->dtype == DType::kFloat64 ? 64 : 32;
  bool contiguous = true;
  for (int s = 0; s < streams; ++s) {
    const TensorView& t = views[s];
    if (t.device != device) refuse("every tensor must be on the device of the step");
    const bool compact = s > kGrad && item->child.bits != nullptr;
    if (compact && (t.ndim != 1 || t.numel() != item->child.count || !t.contiguous()))
      refuse("the state of a child network must be contiguous, with a value for each of its weights");
    if (!compact && !t.same_shape(param)) refuse("param, grad and state must have one shape");
    const bool right = s <= kGrad ? t.is(param.type_code, param.bits) : t.is(kCodeFloat, state_bits);
    if (!right) refuse("grad must have the dtype of param, and the state that of the computation");
    if (t.data == nullptr && t.numel() > 0) refuse("every tensor must have memory of its own");
    contiguous = contiguous && (compact || t.contiguous());
    item->data[s] = t.data;
  }
  for (int s = streams; s < kStreams; ++s) item->data[s] = nullptr;
  w->layout_starts.push_back(contiguous ? -1 : static_cast<int64_t>(w->layouts.size()));
  if (contiguous) return;
  w->layouts.push_back(param.ndim);
  w->layouts.insert(w->layouts.end(), param.shape, param.shape + param.ndim);
  for (int s = 0; s < streams; ++s) {
    if (views[s].ndim != param.ndim) break;  // compact state, which needs no strides
    w->layouts.insert(w->layouts.end(), views[s].strides, views[s].strides + param.ndim);
  }
}

// Notes where the step count is stored, and returns the number of the step now taken.
uint64_t next_step(const TensorView& t, Workspace* w) {
  const bool is_double = t.is(kCodeFloat, 64);
  if (!(is_double || t.is(kCodeFloat, 32)) || t.numel() != 1 || !t.on_cpu() || t.data == nullptr) {
    refuse("step must be one float32 or float64 on the CPU");
  }
  const double value = is_double ? *static_cast<double*>(t.data) : *static_cast<float*>(t.data);
  const double limit = is_double ? 4294967295.0 : 16777216.0;  // a float32 counts no further: 2^24 + 1 rounds to 2^24
  if (!(value >= 0 && value < limit) || value != std::floor(value))
    refuse("step must be a whole number that can be counted up: below 2^32 - 1, or 2^24 for a float32");
  w->step_counters.push_back(t.data);
  w->step_is_double.push_back(is_double);
  return static_cast<uint64_t>(value) + 1;
}

// Returns the memory of one number, after checking that it is on the device and a float32 or, if `may_be_double`, a
// float64.
const void* number_on(int device, const TensorView& t, const char* name, bool may_be_double = false) {
  const bool is_number = t.is(kCodeFloat, 32) || (may_be_double && t.is(kCodeFloat, 64));
  if (!is_number || t.numel() != 1 || t.device != device || t.data == nullptr)
    refuse(std::string(name) + " must be one number on the device of the step");
  return t.data;
}

// Writes the step counts of the steps that have been taken.
void write_steps(const Workspace& w) {
  for (size_t i = 0; i < w.items.size(); ++i) {
    const double step = w.items[i].key.step;
    if (w.step_is_double[i]) {
      *static_cast<double*>(w.step_counters[i]) = step;
    } else {
      *static_cast<float*>(w.step_counters[i]) = static_cast<float>(step);
    }
  }
}

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

DeviceGroup device_group(const py::handle& group, int device, const HyperParams& h) {
  DeviceGroup result{};
  result.hyper = h;
  const py::object lr = group.attr("lr_on_device"), max_grad_norm = group.attr("max_grad_norm");
  if (!lr.is_none()) {
    const TensorView view = view_tensor(lr.ptr());
    result.lr = number_on(device, view, "lr", true);
    result.lr_is_double = view.bits == 64;
  }
  result.clips = !max_grad_norm.is_none();
  result.child_norm = group.attr("child_norm").cast<bool>();
  if (result.clips) result.max_grad_norm = max_grad_norm.cast<double>();
  return result;
}

MaskSlice mask_slice(const py::object& slices, size_t i, int64_t numel) {
  if (slices.is_none()) return {};
  const auto entry = py::list(slices)[i].cast<py::tuple>();
  const MaskSlice slice{entry[0].cast<uint64_t>(), entry[1].cast<int64_t>(), entry[2].cast<uint64_t>()};
  if (slice.run < 0 || (slice.run > 0 && numel % slice.run != 0)) refuse("a slice must hold whole runs");
  return slice;
}

void add_group(const py::handle& group, int device, Counter counter, Workspace* w) {
  const TensorList params(group, "params"), grads(group, "grads"), exp_avgs(group, "exp_avgs"),
      exp_avg_sqs(group, "exp_avg_sqs"), max_exp_avg_sqs(group, "max_exp_avg_sqs"), steps(group, "steps"),
      bits(group, "child_bits"), offsets(group, "child_offsets");
  const py::list indices(group.attr("indices")), counts(group.attr("child_counts"));
  const py::object slices = group.attr("slices");
  const bool amsgrad = group.attr("amsgrad").cast<bool>();
  const bool decay_outside = group.attr("decay_outside").cast<bool>();
  const uint32_t keep_threshold = group.attr("keep_threshold").cast<uint32_t>();
  const uint64_t seed = group.attr("seed").cast<uint64_t>();
  const HyperParams h = hyper_params(group);
  if (counter == Counter::kGpu) w->groups.push_back(device_group(group, device, h));
  uint64_t constants_step = 0;  // parameters of a group mostly share their step count, so its constants too
  AdamWConstants<double> constants{};
  for (size_t i = 0; i < params.list.size(); ++i) {
    TensorView views[kStreams] = {params.at(i), grads.at(i), exp_avgs.at(i), exp_avg_sqs.at(i), {}};
    if (amsgrad) views[kMaxExpAvgSq] = max_exp_avg_sqs.at(i);
    StepItem item{};
    if (bits.list.size() > 0) {
      const auto count = counts[i].cast<int64_t>();
      item.child = packed_mask(bits.at(i), offsets.at(i), count, views[kParam].numel(), device);
    }
    set_arrays(views, amsgrad ? 5 : 4, device, w, &item);
    if (counter == Counter::kGpu) {
      item.counter = const_cast<float*>(static_cast<const float*>(number_on(device, steps.at(i), "step")));
      item.group = static_cast<uint32_t>(w->groups.size() - 1);
    } else if (const uint64_t step = next_step(steps.at(i), w); step != constants_step) {
      constants = step_constants(h, step);
      constants_step = step;
    }
    item.constants = constants;
    item.masked = keep_threshold < kKeepAll;
    item.keep_threshold = keep_threshold;
    item.key = {seed, static_cast<uint32_t>(constants_step), indices[i].cast<uint32_t>()};
    item.slice = mask_slice(slices, i, item.numel);
    item.decay_outside = decay_outside;
    w->items.push_back(item);
  }
}

}  // namespace
}  // namespace childtune
