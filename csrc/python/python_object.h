// Python objects without pybind11, whose headers take longer to compile than all kernels of an instruction set.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>

namespace childtune {

// Thrown where Python's error indicator is set.
struct PythonError {};

// Owns a reference to a Python object. Throws PythonError if it is given nullptr, which is how Python says that it
// raised.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {
    if (owned == nullptr) throw PythonError();
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  Object attribute(const char* name) const { return Object(PyObject_GetAttrString(object_, name)); }
  Object call(const char* method) const { return Object(PyObject_CallMethod(object_, method, nullptr)); }
  Object at(Py_ssize_t i) const { return Object(PySequence_GetItem(object_, i)); }

  int64_t integer() const {
    const long long value = PyLong_AsLongLong(object_);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }

  std::string text() const {
    const Object string(PyObject_Str(object_));
    const char* utf8 = PyUnicode_AsUTF8(string.object_);
    if (utf8 == nullptr) throw PythonError();
    return utf8;
  }

 private:
  PyObject* object_;
};

}  // namespace childtune
