// The two ways to read a torch.Tensor: by the DLPack C exchange API, and by Python attributes.
#include "python/tensor_view.h"

#include <deque>
#include <string>
#include <utility>
#include <vector>

namespace childtune {
namespace {

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

// The part of DLPack's C ABI that is used here: https://dmlc.github.io/dlpack/latest/c_api.html, major version 1.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchangeApi {
  uint32_t major, minor;
  void* previous_version;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DlTensor* out);
  void* current_work_stream;
};

constexpr int32_t kDlCpu = 1, kDlCuda = 2;

struct Torch {
  PyTypeObject* tensor_type;
  const DlExchangeApi* api = nullptr;

  Torch() {
    // Neither reference is ever dropped: `api` and `tensor_type` must stay valid.
    PyObject* type = Object(PyImport_ImportModule("torch")).attribute("Tensor").release();
    tensor_type = reinterpret_cast<PyTypeObject*>(type);
    if (!PyObject_HasAttrString(type, "__dlpack_c_exchange_api__")) return;
    PyObject* capsule = Object(PyObject_GetAttrString(type, "__dlpack_c_exchange_api__")).release();
    if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return;
    const auto* found = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (found->major == 1 && found->dltensor_from_py_object_no_sync != nullptr) api = found;
  }
};

const Torch& torch() {
  static const Torch* found = new Torch;
  return *found;
}

bool attributes_forced = false;

TensorView view_by_exchange(PyObject* tensor) {
  DlTensor t;
  if (torch().api->dltensor_from_py_object_no_sync(tensor, &t) != 0) throw PythonError();
  return {static_cast<char*>(t.data) + t.byte_offset,
          t.shape,
          t.strides,
          t.ndim,
          t.type_code,
          t.bits,
          t.device_type == kDlCpu    ? kCpu
          : t.device_type == kDlCuda ? t.device_id
                                     : kOtherDevice};
}

thread_local std::deque<std::vector<int64_t>> kept_shapes;  // a deque: growing moves no vector

TensorView view_by_attributes(PyObject* borrowed) {
  Py_INCREF(borrowed);
  const Object tensor(borrowed), shape = tensor.attribute("shape"), strides = tensor.call("stride");
  const int64_t ndim = tensor.attribute("ndim").integer();
  std::vector<int64_t> sizes(2 * ndim);
  for (int64_t d = 0; d < ndim; ++d) {
    sizes[d] = shape.at(d).integer();
    sizes[ndim + d] = strides.at(d).integer();
  }
  kept_shapes.push_back(std::move(sizes));
  const std::string dtype = tensor.attribute("dtype").text();
  TensorView view{reinterpret_cast<void*>(static_cast<uintptr_t>(tensor.call("data_ptr").integer())),
                  kept_shapes.back().data(),
                  kept_shapes.back().data() + ndim,
                  static_cast<int32_t>(ndim),
                  kCodeOther,
                  static_cast<uint8_t>(8 * tensor.call("element_size").integer()),
                  kOtherDevice};
  if (tensor.attribute("is_cpu").integer() != 0) view.device = kCpu;
  if (tensor.attribute("is_cuda").integer() != 0) view.device = static_cast<int>(tensor.call("get_device").integer());
  if (dtype == "torch.float32" || dtype == "torch.float64" || dtype == "torch.float16") view.type_code = kCodeFloat;
  if (dtype == "torch.int64") view.type_code = kCodeInt;
  if (dtype == "torch.bfloat16") view.type_code = kCodeBFloat;
  if (dtype == "torch.uint8") view.type_code = kCodeUInt;
  return view;
}

}  // namespace

bool TensorView::same_shape(const TensorView& other) const {
  if (ndim != other.ndim) return false;
  for (int32_t d = 0; d < ndim; ++d) {
    if (shape[d] != other.shape[d]) return false;
  }
  return true;
}

bool TensorView::contiguous() const {
  int64_t expected = 1;
  for (int32_t d = ndim - 1; d >= 0; --d) {
    if (shape[d] == 0) return true;
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

TensorView view_tensor(PyObject* tensor) {
  if (!PyObject_TypeCheck(tensor, torch().tensor_type)) {
    PyErr_Format(PyExc_TypeError, "a torch.Tensor is required (got %s)", Py_TYPE(tensor)->tp_name);
    throw PythonError();
  }
  return torch().api && !attributes_forced ? view_by_exchange(tensor) : view_by_attributes(tensor);
}

void forget_views() { kept_shapes.clear(); }

const char* tensor_access() {
  return torch().api && !attributes_forced ? "DLPack C exchange API" : "tensor attributes";
}

void force_attribute_access(bool force) { attributes_forced = force; }

}  // namespace childtune
