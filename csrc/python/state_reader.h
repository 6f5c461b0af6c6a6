// Reads a group's parameters, their gradients and states into the lists of a StepGroup: in 0.2 us a parameter what
// childtune_fast/optimizer/collect.py does in 1 us. It knows the usual parameter alone; of anything else it says so,
// and collect.py has the rules and the sentences. Included by bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "python/argument.h"
#include "python/tensor_view.h"

namespace py = pybind11;

namespace childtune {
namespace {

py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

// Looks up keys in a dict that mostly has them in the order in which they are asked for. The next key is then the one
// that is looked for, by its identity; that saves Tensor.__hash__, which is Python code.
class OrderedDict {
 public:
  explicit OrderedDict(py::object dict) : dict_(std::move(dict)) { advance(); }

  // Goes on behind `key` if it is the next one, and returns its value; else nothing.
  py::object next(const py::object& key) {
    if (!key_.is(key)) return {};
    py::object value = value_;
    advance();
    return value;
  }

  // Returns the value of `key`, or nothing.
  py::object find(const py::object& key) {
    if (py::object value = next(key)) return value;
    return PyDict_GET_SIZE(dict_.ptr()) == 0 ? py::object() : value_of(dict_, key);
  }

  static py::object value_of(const py::object& dict, const py::object& key) {
    PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return borrowed(value);
  }

 private:
  void advance() {
    PyObject *key = nullptr, *value = nullptr;
    PyDict_Next(dict_.ptr(), &at_, &key, &value);
    py::object held_key = borrowed(key), held_value = borrowed(value);  // before the last ones go, which may run code
    key_ = std::move(held_key);
    value_ = std::move(held_value);
  }

  py::object dict_, key_, value_;
  Py_ssize_t at_ = 0;
};

// The entries of a list for Python, which is made when all are known, so that it is never moved.
struct Column {
  std::vector<py::object> entries;

  void add(py::object entry) { entries.push_back(std::move(entry)); }

  py::list list() {
    py::list made(entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      PyList_SET_ITEM(made.ptr(), static_cast<Py_ssize_t>(i), entries[i].release().ptr());
    }
    return made;
  }
};

// The lists of a StepGroup for some of its parameters.
struct Columns {
  Column params, grads, indices, states[4], masks;

  py::tuple tuple(bool amsgrad) {
    const py::tuple usual = py::make_tuple(params.list(), grads.list(), states[0].list(), states[1].list(),
                                           states[2].list(), indices.list());
    return amsgrad ? py::tuple(usual + py::make_tuple(states[3].list())) : usual;
  }
};

// Reads the groups of an optimizer, one after the other. `states` is the optimizer's state; `masks` has those of a
// child network's parameters, or is None.
class StateReader {
 public:
  StateReader(const py::object& states, const py::object& masks)
      : usual_(is_dict(states) && (masks.is_none() || PyDict_CheckExact(masks.ptr()))),
        states_(usual_ ? states : py::dict()),
        masks_(usual_ && !masks.is_none() ? masks : py::dict()) {}

  // Returns the columns of the parameters that have a gradient and no mask, of those that have a mask, and the masks of
  // these; None if anything is unusual. `first` is the number of the first parameter in the optimizer.
  py::object read(const py::object& params, Arg<Py_ssize_t> first, Arg<bool> amsgrad) {
    if (!usual_ || !PyList_CheckExact(params.ptr())) return py::none();
    const auto held =
        py::reinterpret_steal<py::tuple>(PyList_AsTuple(params.ptr()));  // Python code may change the list
    if (!held) throw py::error_already_set();
    Columns plain, masked;
    Py_ssize_t index = first.value;
    for (const py::handle& param : held) {
      if (!add(borrowed(param.ptr()), index++, amsgrad.value, &plain, &masked)) return py::none();
    }
    return py::make_tuple(plain.tuple(amsgrad.value), masked.tuple(amsgrad.value), masked.masks.list());
  }

 private:
  static bool is_dict(const py::object& states) {
    return PyDict_CheckExact(states.ptr()) ||
           py::type::handle_of(states).is(py::module_::import("collections").attr("defaultdict"));
  }

  static py::object interned(const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  }

  // Adds a parameter to its columns, if it has a gradient. Returns false if it is unusual.
  bool add(const py::object& param, Py_ssize_t index, bool amsgrad, Columns* plain, Columns* masked) {
    if (!is_plain_on_cpu(param.ptr())) return false;
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), grad_.ptr()));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) {
      states_.next(param);
      masks_.next(param);
      return true;
    }
    if (!is_plain_on_cpu(grad.ptr())) return false;
    py::object state = states_.find(param), mask = masks_.find(param);
    if (!state || !PyDict_CheckExact(state.ptr())) return false;
    Columns* columns = mask ? masked : plain;
    const int keys = amsgrad ? 4 : 3;
    for (int k = 0; k < keys; ++k) {
      py::object value = OrderedDict::value_of(state, keys_[k]);
      if (!value) return false;
      columns->states[k].add(std::move(value));
    }
    columns->params.add(param);
    columns->grads.add(std::move(grad));
    columns->indices.add(py::int_(index));
    if (mask) columns->masks.add(std::move(mask));
    return true;
  }

  bool usual_;
  OrderedDict states_, masks_;
  py::object grad_ = interned("grad");
  py::object keys_[4] = {interned("exp_avg"), interned("exp_avg_sq"), interned("step"), interned("max_exp_avg_sq")};
};

}  // namespace
}  // namespace childtune
