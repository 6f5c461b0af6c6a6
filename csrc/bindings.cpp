// The Python module: turns the groups of a step into StepItems, checking everything that memory safety rests on, and
// runs them without the GIL. The sentences that users see for wrong input are written in childtune_fast/checks.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/philox.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "python/tensor_view.h"

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME _native
#endif

namespace py = pybind11;

namespace childtune {
namespace {

// Kept between steps, so that a step allocates nothing.
struct Workspace {
  std::vector<StepItem> items;
  std::vector<void*> step_counters;  // where each item's step count is stored
  std::vector<bool> step_is_double;
  std::vector<int64_t> layouts;        // of arrays that are not contiguous
  std::vector<int64_t> layout_starts;  // of each item in `layouts`, or -1

  void clear() {
    items.clear();
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

// A real list: the group holds it, so its tensors outlive the step. Of another iterable, a copy would be all that does.
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

// Sets the item's arrays, after checking that all lie on the CPU with the shape and the dtypes that the kernel assumes.
void set_arrays(const TensorView* views, int streams, Workspace* w, StepItem* item) {
  const TensorView& param = views[kParam];
  item->dtype = param_dtype(param);
  item->numel = param.numel();
  const uint8_t state_bits = item->dtype == DType::kFloat64 ? 64 : 32;
  bool contiguous = true;
  for (int s = 0; s < streams; ++s) {
    const TensorView& t = views[s];
    if (!t.on_cpu) refuse("every tensor must be on the CPU");
    if (!t.same_shape(param)) refuse("param, grad and state must have one shape");
    const bool right = s <= kGrad ? t.is(param.type_code, param.bits) : t.is(kCodeFloat, state_bits);
    if (!right) refuse("grad must have the dtype of param, and the state that of the computation");
    if (t.data == nullptr && item->numel > 0) refuse("every tensor must have memory of its own");
    contiguous = contiguous && t.contiguous();
    item->data[s] = t.data;
  }
  for (int s = streams; s < kStreams; ++s) item->data[s] = nullptr;
  w->layout_starts.push_back(contiguous ? -1 : static_cast<int64_t>(w->layouts.size()));
  if (contiguous) return;
  w->layouts.push_back(param.ndim);
  w->layouts.insert(w->layouts.end(), param.shape, param.shape + param.ndim);
  for (int s = 0; s < streams; ++s)
    w->layouts.insert(w->layouts.end(), views[s].strides, views[s].strides + param.ndim);
}

// Notes where the step count is stored, and returns the number of the step now taken.
uint64_t next_step(const TensorView& t, Workspace* w) {
  const bool is_double = t.is(kCodeFloat, 64);
  if (!(is_double || t.is(kCodeFloat, 32)) || t.numel() != 1 || !t.on_cpu || t.data == nullptr) {
    refuse("step must be one float32 or float64 on the CPU");
  }
  const double value = is_double ? *static_cast<double*>(t.data) : *static_cast<float*>(t.data);
  if (!(value >= 0 && value < 4294967295.0) || value != std::floor(value))
    refuse("step must be a whole number below 2^32");
  w->step_counters.push_back(t.data);
  w->step_is_double.push_back(is_double);
  return static_cast<uint64_t>(value) + 1;
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

MaskSlice mask_slice(const py::object& slices, size_t i, int64_t numel) {
  if (slices.is_none()) return {};
  const auto entry = py::list(slices)[i].cast<py::tuple>();
  const MaskSlice slice{entry[0].cast<uint64_t>(), entry[1].cast<int64_t>(), entry[2].cast<uint64_t>()};
  if (slice.run < 0 || (slice.run > 0 && numel % slice.run != 0)) refuse("a slice must hold whole runs");
  return slice;
}

void add_group(const py::handle& group, Workspace* w) {
  const TensorList params(group, "params"), grads(group, "grads"), exp_avgs(group, "exp_avgs"),
      exp_avg_sqs(group, "exp_avg_sqs"), max_exp_avg_sqs(group, "max_exp_avg_sqs"), steps(group, "steps");
  const py::list indices(group.attr("indices"));
  const py::object slices = group.attr("slices");
  const bool amsgrad = group.attr("amsgrad").cast<bool>();
  const uint32_t keep_threshold = group.attr("keep_threshold").cast<uint32_t>();
  const uint64_t seed = group.attr("seed").cast<uint64_t>();
  const HyperParams h = hyper_params(group);
  uint64_t constants_step = 0;  // parameters of a group mostly share their step count, so its constants too
  AdamWConstants<double> constants{};
  for (size_t i = 0; i < params.list.size(); ++i) {
    TensorView views[kStreams] = {params.at(i), grads.at(i), exp_avgs.at(i), exp_avg_sqs.at(i), {}};
    if (amsgrad) views[kMaxExpAvgSq] = max_exp_avg_sqs.at(i);
    StepItem item;
    set_arrays(views, amsgrad ? 5 : 4, w, &item);
    const uint64_t step = next_step(steps.at(i), w);
    if (step != constants_step) {
      constants = step_constants(h, step);
      constants_step = step;
    }
    item.constants = constants;
    item.masked = keep_threshold < kKeepAll;
    item.keep_threshold = keep_threshold;
    item.key = {seed, static_cast<uint32_t>(step), indices[i].cast<uint32_t>()};
    item.slice = mask_slice(slices, i, item.numel);
    w->items.push_back(item);
  }
}

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

void step(const py::list& groups, int threads) {
  Workspace& w = workspace();
  for (const py::handle& group : groups) add_group(group, &w);
  w.place_layouts();
  const py::gil_scoped_release no_gil;
  step_cpu(w.items, threads);
  write_steps(w);
}

double sum_of_squares(const py::list& tensors, int threads) {
  Workspace& w = workspace();
  for (const py::handle& tensor : tensors) {
    const TensorView view = view_tensor(tensor.ptr());
    const TensorView views[] = {view, view};
    StepItem item{};
    set_arrays(views, 2, &w, &item);
    w.items.push_back(item);
  }
  w.place_layouts();
  const py::gil_scoped_release no_gil;
  return sum_of_squares_cpu(w.items, threads);
}

bool accumulate_squares(const py::object& score, const py::object& grad, double weight, double grad_factor,
                        int threads) {
  Workspace& w = workspace();
  const TensorView scores = view_tensor(score.ptr()), grads = view_tensor(grad.ptr());
  if (!scores.on_cpu || !grads.on_cpu) refuse("every tensor must be on the CPU");
  if (!scores.is(kCodeFloat, 32) || !scores.contiguous()) refuse("score must be float32 and contiguous");
  if (!grads.same_shape(scores)) refuse("score and grad must have one shape");
  StepItem item{};
  item.dtype = param_dtype(grads);
  item.numel = grads.numel();
  if (item.numel > 0 && (scores.data == nullptr || grads.data == nullptr))
    refuse("every tensor must have memory of its own");
  item.data[kGrad] = grads.data;
  item.data[kExpAvgSq] = scores.data;
  w.layout_starts.push_back(grads.contiguous() ? -1 : 0);
  w.layouts.push_back(grads.ndim);
  for (const int64_t* row : {grads.shape, scores.strides, grads.strides})  // in the place of kParam: not read
    w.layouts.insert(w.layouts.end(), row, row + grads.ndim);
  w.items.push_back(item);
  w.place_layouts();
  const py::gil_scoped_release no_gil;
  return accumulate_squares_cpu(w.items, weight, grad_factor, threads);
}

std::vector<uint32_t> philox(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
  if (counter.size() != 4 || key.size() != 2)
    refuse("philox4x32_10: four counter words and two key words are required");
  const Philox4 out = philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {out.word, out.word + 4};
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

}  // namespace
}  // namespace childtune

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace childtune;
  m.doc() = "Compiled kernels of childtune_fast. The public interface is the Python package.";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const PythonError&) {  // what Python is to raise is set already
    }
  });
  m.attr("MASK_VERSION") = kMaskVersion;
  m.def("step", &step, py::arg("groups"), py::arg("threads"));
  m.def("sum_of_squares", &sum_of_squares, py::arg("tensors"), py::arg("threads"));
  m.def("accumulate_squares", &accumulate_squares, py::arg("score"), py::arg("grad"), py::arg("weight"),
        py::arg("grad_factor"), py::arg("threads"));
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"));
  m.def("instruction_set", &instruction_set);
  m.def("supported_instruction_sets", &supported_instruction_sets);
  m.def("set_instruction_set", [](const std::string& name) {
    if (!set_instruction_set(name)) refuse("set_instruction_set: this processor has no '" + name + "'");
  });
  m.def("compiler", &compiler);
  m.def("parallel_runtime", &parallel_runtime);
  m.def("tensor_access", &tensor_access);
  m.def("force_attribute_access", &force_attribute_access, py::arg("force"));
}
