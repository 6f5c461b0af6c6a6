// Checks everything that memory safety rests on, and turns tensors into the arrays of StepItems. Included by
// bindings.cpp only, so that pybind11's headers are compiled once. The sentences that users see for wrong tensors are
// written in childtune_fast/ops/step_group.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/codes.h"
#include "core/step_item.h"
#include "cuda/device_constants.h"
#include "python/tensor_view.h"
#include "python/written_memory.h"

namespace py = pybind11;

namespace childtune {
namespace {

// Kept between steps, so that a step allocates little.
struct Workspace {
  std::vector<StepItem> items;
  std::vector<DeviceGroup> groups;         // where a GPU counts the steps
  std::vector<StepCounter> step_counters;  // of each item
  std::vector<int64_t> layouts;            // of arrays that are not contiguous
  std::vector<int64_t> layout_starts;      // of each item in `layouts`, or -1

  void clear() {
    items.clear();
    groups.clear();
    step_counters.clear();
    layouts.clear();
    layout_starts.clear();
  }

  // Growing `layouts` moves it, so pointers into it are set last.
  void place_layouts() {
    for (size_t i = 0; i < items.size(); ++i) {
      items[i].layout = layout_starts[i] < 0 ? nullptr : layouts.data() + layout_starts[i];
    }
  }
};

// The thread's workspace, empty; ask for it in a Call alone.
Workspace& workspace() {
  thread_local Workspace w;
  w.clear();
  return w;
}

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

DType param_dtype(const TensorView& t) {
  if (t.is(kCodeFloat, 32)) return DType::kFloat32;
  if (t.is(kCodeFloat, 64)) return DType::kFloat64;
  if (t.is(kCodeBFloat, 16)) return DType::kBFloat16;
  if (t.is(kCodeFloat, 16)) return DType::kFloat16;
  refuse("param must be float32, float64, bfloat16 or float16");
}

bool is_vector_of(const TensorView& t, uint8_t code, uint8_t bits, int64_t numel, int device) {
  return t.is(code, bits) && t.device == device && t.ndim == 1 && t.numel() == numel && t.contiguous();
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

// Returns how a state array is stored, of a parameter with the item's dtype.
StateKind state_kind(const TensorView& t, DType dtype) {
  if (dtype != DType::kFloat64 && t.is(kCodeUInt, 8)) return StateKind::kCodes;
  if (dtype != DType::kFloat64 && t.is(kCodeBFloat, 16)) return StateKind::kBFloat16;
  if (t.is(kCodeFloat, dtype == DType::kFloat64 ? 64 : 32)) return StateKind::kComputed;
  refuse("the state must have the dtype of the computation, or be bfloat16 or uint8");
}

// Sets the item's arrays, after checking that all lie on the device with the shape and the dtypes that the kernel
// assumes. item->child must be set before: with a child network, the state must be compact.
void set_arrays(const TensorView* views, int streams, int device, Workspace* w, StepItem* item) {
  const TensorView& param = views[kParam];
  item->dtype = param_dtype(param);
  item->numel = param.numel();
  item->state = streams > kExpAvg ? state_kind(views[kExpAvg], item->dtype) : StateKind::kComputed;
  bool contiguous = true;
  for (int s = 0; s < streams; ++s) {
    const TensorView& t = views[s];
    if (t.device != device) refuse("every tensor must be on the device of the step");
    const bool compact = s > kGrad && item->child.bits != nullptr;
    if (compact && (t.ndim != 1 || t.numel() != item->child.count || !t.contiguous()))
      refuse("the state of a child network must be contiguous, with a value for each of its weights");
    if (!compact && !t.same_shape(param)) refuse("param, grad and state must have one shape");
    if (s > kGrad && item->state == StateKind::kCodes && !t.contiguous()) refuse("codes must be contiguous");
    const bool right = s <= kGrad ? t.is(param.type_code, param.bits) : state_kind(t, item->dtype) == item->state;
    if (!right) refuse("grad must have the dtype of param, and all of the state one dtype");
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

// The scales of an average in codes, after checking that there is one for each block of a parameter of `numel` weights.
uint8_t* code_scales(const TensorView& t, int64_t numel, int device) {
  if (!is_vector_of(t, kCodeUInt, 8, (numel + kCodeBlock - 1) / kCodeBlock, device))
    refuse("scales must hold a uint8 on the device of the step for each 128 weights begun");
  return static_cast<uint8_t*>(t.data);
}

// Notes where the step count is stored, and returns the number of the step now taken.
uint64_t next_step(const TensorView& t, Workspace* w) {
  const bool is_double = t.is(kCodeFloat, 64);
  if (!(is_double || t.is(kCodeFloat, 32)) || t.numel() != 1 || !t.on_cpu()) {
    refuse("step must be one float32 or float64 on the CPU");
  }
  const double value = is_double ? *static_cast<double*>(t.data) : *static_cast<float*>(t.data);
  const double limit = is_double ? 4294967295.0 : 16777216.0;  // a float32 counts no further: 2^24 + 1 rounds to 2^24
  if (!(value >= 0 && value < limit) || value != std::floor(value))
    refuse("step must be a whole number that can be counted up: below 2^32 - 1, or 2^24 for a float32");
  w->step_counters.push_back({t.data, is_double});
  return static_cast<uint64_t>(value) + 1;
}

// Returns the memory of one number, after checking that it is on the device and a float32 or, if `may_be_double`, a
// float64.
const void* number_on(int device, const TensorView& t, const char* name, bool may_be_double = false) {
  const bool is_number = t.is(kCodeFloat, 32) || (may_be_double && t.is(kCodeFloat, 64));
  if (!is_number || t.numel() != 1 || t.device != device)
    refuse(std::string(name) + " must be one number on the device of the step");
  return t.data;
}

double* count_on(int device, const TensorView& t) {
  if (!t.is(kCodeFloat, 64) || t.numel() != 1 || t.device != device)
    refuse("step must be one float64 on the device of the step");
  return static_cast<double*>(t.data);
}

// Writes the step counts of the steps that have been taken.
void write_steps(const Workspace& w) {
  for (size_t i = 0; i < w.items.size(); ++i) {
    const double step = w.items[i].key.step;
    const StepCounter& counter = w.step_counters[i];
    if (counter.is_double) {
      *static_cast<double*>(counter.at) = step;
    } else {
      *static_cast<float*>(counter.at) = static_cast<float>(step);
    }
  }
}

}  // namespace
}  // namespace childtune
