// An argument of the module's functions. Included by bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace childtune {
namespace {

// An argument whose wrong kind is told in a few words. pybind11 itself would print all arguments, and torch cannot
// print a tensor whose memory was freed.
template <class T>
struct Arg {
  T value;
};

}  // namespace
}  // namespace childtune

namespace pybind11::detail {

template <class T>
struct type_caster<childtune::Arg<T>> {
  PYBIND11_TYPE_CASTER(childtune::Arg<T>, make_caster<T>::name);

  bool load(handle source, bool) {
    make_caster<T> caster;
    if (!caster.load(source, true))
      throw type_error(std::string("an argument has a wrong kind or range (got ") + Py_TYPE(source.ptr())->tp_name +
                       ")");
    value.value = cast_op<T>(caster);
    return true;
  }
};

}  // namespace pybind11::detail
