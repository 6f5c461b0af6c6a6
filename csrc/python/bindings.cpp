// The Python module: turns what Python passes into the structs of the kernels, checks everything that memory safety
// rests on, and runs them without the GIL. The sentences that users see for wrong tensors are written in
// childtune_fast/ops/step_group.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/philox.h"
#include "core/rounding.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "python/argument.h"
#include "python/gpu_scores.h"
#include "python/gpu_step.h"
#include "python/state_reader.h"
#include "python/step_groups.h"
#include "python/step_items.h"

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME _native
#endif

namespace childtune {
namespace {

using List = Arg<py::list>;
using Int = Arg<int>;

// `checked` is what the last step of these groups returned, or 0. `undo` is a dict, which is cleared when the step has
// been taken, or None.
uint64_t step(const List& groups, Int threads, Arg<uint64_t> checked, const py::object& undo) {
  check_undo(undo);
  const Step step(groups.value, kCpu, Counter::kHost, checked.value);
  {
    const py::gil_scoped_release no_gil;
    step_cpu(step.items().items, threads.value);
    write_steps(step.items());
  }
  return step.taken(undo);
}

// `bits` has an entry for each tensor: the mask of the elements that count, or None if all do.
std::vector<double> sums_of_squares(const List& tensors, const List& bits, Int threads) {
  const Call call;
  Workspace& w = workspace();
  const py::tuple held(tensors.value), masks(bits.value);  // another thread may clear the lists
  if (masks.size() != held.size()) refuse("child_bits must have an entry for each tensor");
  for (size_t i = 0; i < held.size(); ++i) {
    const TensorView view = view_tensor(py::handle(held[i]).ptr());
    const TensorView views[] = {view, view};
    StepItem item{};
    const py::handle mask = masks[i];
    if (!mask.is_none()) item.child.bits = child_bits(view_tensor(mask.ptr()), view.numel(), kCpu);
    set_arrays(views, 2, kCpu, &w, &item);
    w.items.push_back(item);
  }
  w.place_layouts();
  const py::gil_scoped_release no_gil;
  return sums_of_squares_cpu(w.items, threads.value);
}

// Writes the packed masks of the k highest or lowest scores; returns the number of the first tensor with a NaN, or -1.
int64_t select_top(const List& scores, const List& bits, Arg<int64_t> count, Arg<bool> largest, Int threads) {
  const Call call;
  const py::tuple held(scores.value), masks(bits.value);  // another thread may clear the lists
  if (masks.size() != held.size()) refuse("select_top: each tensor of scores must have its bits");
  std::vector<ScoredTensor> tensors;
  int64_t total = 0;
  for (size_t i = 0; i < held.size(); ++i) {
    const TensorView from = view_tensor(held[i].ptr()), to = view_tensor(masks[i].ptr());
    if (!from.on_cpu() || !to.on_cpu()) refuse("select_top: every tensor must be on the CPU");
    if (!from.is(kCodeFloat, 32) || !from.contiguous()) refuse("select_top: scores must be float32 and contiguous");
    if (!to.is(kCodeUInt, 8) || !to.contiguous()) refuse("select_top: bits must be uint8 and contiguous");
    if (to.numel() != mask_bytes(from.numel()))
      refuse("select_top: bits must have 128 bytes for each 1024 scores begun");
    tensors.push_back({static_cast<const float*>(from.data), static_cast<uint8_t*>(to.data), from.numel()});
    total += from.numel();
  }
  const int64_t k = count.value;
  if (k < 0 || k > total) refuse("select_top: k must lie between 0 and the number of scores");
  const py::gil_scoped_release no_gil;
  return select_cpu(tensors, k, largest.value, threads.value);
}

bool accumulate_squares(const py::object& score, const py::object& grad, Arg<double> weight, Arg<double> grad_factor,
                        Int threads) {
  const Call call;
  const TensorView scores = view_tensor(score.ptr()), grads = view_tensor(grad.ptr());
  if (!scores.on_cpu() || !grads.on_cpu()) refuse("every tensor must be on the CPU");
  if (!scores.is(kCodeFloat, 32) || !scores.contiguous()) refuse("score must be float32 and contiguous");
  if (!grads.same_shape(scores)) refuse("score and grad must have one shape");
  SquaresItem item{grads.data, static_cast<float*>(scores.data), grads.numel(), nullptr, param_dtype(grads)};
  std::vector<int64_t> layout;
  if (!grads.contiguous()) {
    layout.push_back(grads.ndim);
    layout.insert(layout.end(), grads.shape, grads.shape + grads.ndim);
    layout.insert(layout.end(), grads.strides, grads.strides + grads.ndim);
    item.layout = layout.data();
  }
  const py::gil_scoped_release no_gil;
  return accumulate_squares_cpu(item, weight.value, grad_factor.value, threads.value);
}

std::vector<uint32_t> philox(const Arg<std::vector<uint32_t>>& counter_words,
                             const Arg<std::vector<uint32_t>>& key_words) {
  const std::vector<uint32_t>&counter = counter_words.value, &key = key_words.value;
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

namespace childtune {
namespace {

// Defines a function, or a method, of which a call with other arguments than it has is told in a few words too.
template <class Scope, class Function, class... Extra>
void define(Scope& scope, const char* name, Function function, const Extra&... extra) {
  scope.def(name, function, extra...);
  scope.def(name, [name](const py::args&, const py::kwargs&) {
    throw py::type_error(std::string(name) + ": an argument is missing, unknown or too many");
  });
}

}  // namespace
}  // namespace childtune

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace childtune;
  m.doc() = "Compiled kernels of childtune_fast. The public interface is the Python package.";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const PythonError&) {  // Python's error indicator is set already
    } catch (const UnverifiedMemory& doubt) {
      const py::object type = py::module_::import("childtune_fast.native").attr("UnverifiedMemory");
      PyErr_SetObject(type.ptr(), type(doubt.digest).ptr());
    } catch (const CudaError& error) {
      const py::object type = py::module_::import("childtune_fast.native").attr("CudaError");
      PyErr_SetObject(type.ptr(), type(error.what(), error.code, error.begun).ptr());
    }
  });
  m.attr("MASK_VERSION") = kMaskVersion;
  m.attr("ROUNDING_VERSION") = kRoundingVersion;
  define(m, "step", &step, py::arg("groups"), py::arg("threads"), py::arg("checked") = 0, py::arg("undo") = py::none());
  py::class_<StateReader> reader(m, "StateReader");
  reader.def(py::init<const py::object&, const py::object&>(), py::arg("states"), py::arg("masks"));
  define(reader, "read", &StateReader::read, py::arg("params"), py::arg("first"), py::arg("amsgrad"));
  py::class_<GpuKernels> gpu(m, "GpuKernels");
  gpu.def(py::init<int, const py::bytes&>(), py::arg("device"), py::arg("image"));
  define(gpu, "step", &GpuKernels::step, py::arg("groups"), py::arg("stream"), py::arg("checked") = 0,
         py::arg("undo") = py::none());
  define(gpu, "counted_step", &GpuKernels::counted_step, py::arg("groups"), py::arg("stream"), py::arg("memory_of"),
         py::arg("grad_scale"), py::arg("found_inf"), py::arg("checked") = 0, py::arg("undo") = py::none());
  define(gpu, "accumulate_squares", &accumulate_squares_on_gpu, py::arg("score"), py::arg("grad"), py::arg("weight"),
         py::arg("grad_factor"), py::arg("grad_clip"), py::arg("finite"), py::arg("stream"), py::arg("memory_of"));
  define(gpu, "count_digits", &count_digits_on_gpu, py::arg("scores"), py::arg("largest"), py::arg("wanted"),
         py::arg("wanted_shift"), py::arg("shift"), py::arg("counts"), py::arg("nan"), py::arg("stream"));
  define(gpu, "write_above", &write_above_on_gpu, py::arg("scores"), py::arg("largest"), py::arg("threshold"),
         py::arg("bits"), py::arg("ties"), py::arg("stream"));
  define(gpu, "add_ties", &add_ties_on_gpu, py::arg("scores"), py::arg("largest"), py::arg("threshold"),
         py::arg("bits"), py::arg("ties"), py::arg("stream"));
  gpu.def_static("tie_counts", [](int64_t numel) { return tie_counts({{nullptr, nullptr, numel}}); }, py::arg("numel"));
  define(m, "sums_of_squares", &sums_of_squares, py::arg("tensors"), py::arg("child_bits"), py::arg("threads"));
  define(m, "select_top", &select_top, py::arg("scores"), py::arg("bits"), py::arg("k"), py::arg("largest"),
         py::arg("threads"));
  define(m, "accumulate_squares", &accumulate_squares, py::arg("score"), py::arg("grad"), py::arg("weight"),
         py::arg("grad_factor"), py::arg("threads"));
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"));
  m.def("instruction_set", &instruction_set);
  m.def("supported_instruction_sets", &supported_instruction_sets);
  m.def("set_instruction_set", [](const Arg<std::string>& name) {
    if (!set_instruction_set(name.value)) refuse("set_instruction_set: this processor has no '" + name.value + "'");
  });
  m.def("compiler", &compiler);
  m.def("cuda_driver_version", &cuda_driver_version);
  m.def("parallel_runtime", &parallel_runtime);
  m.def("tensor_access", &tensor_access);
  m.def("force_attribute_access", [](Arg<bool> force) { force_attribute_access(force.value); }, py::arg("force"));
}
