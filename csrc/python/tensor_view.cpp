// The two ways to read a torch.Tensor: by the DLPack C exchange API, and by Python attributes.
#include "python/tensor_view.h"

#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

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

// Of torch's C interface for compiled models, which stays the same from release to release: gives a number of the
// at::Tensor at an address, and returns 0 if it could.
using TensorNumber = int32_t (*)(void* tensor, int64_t* number);

TensorNumber find_tensor_number(const char* name) {
#if defined(__unix__) || defined(__APPLE__)
  for (const char* library : {"libtorch_cpu.so", "@rpath/libtorch_cpu.dylib"}) {
    void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);  // never closed, so that what is found stays
    if (loaded != nullptr) return reinterpret_cast<TensorNumber>(dlsym(loaded, name));
  }
#endif
  return nullptr;
}

// Returns how far from the address of a torch.Tensor object its at::Tensor is, which is one pointer; 0 if it is not
// found. The object says by its attribute _cdata what that pointer is.
Py_ssize_t find_tensor_place(PyTypeObject* tensor_type) {
  PyObject* type = reinterpret_cast<PyObject*>(tensor_type);
  if (!PyObject_HasAttrString(type, "_cdata")) return 0;
  PyObject* probe = PyObject_CallNoArgs(type);
  const Object owner(probe);
  const auto expected = static_cast<uintptr_t>(owner.attribute("_cdata").integer());
  for (Py_ssize_t place = sizeof(PyObject); place < tensor_type->tp_basicsize; place += sizeof(void*)) {
    uintptr_t found;
    std::memcpy(&found, reinterpret_cast<const char*>(probe) + place, sizeof(found));
    if (found == expected) return place;
  }
  return 0;
}

struct Torch {
  PyTypeObject* tensor_type;
  const DlExchangeApi* api = nullptr;
  TensorNumber storage_size = nullptr, storage_offset = nullptr;
  Py_ssize_t tensor_place = 0;

  Torch() {
    // Neither reference is ever dropped: `api` and `tensor_type` must stay valid.
    PyObject* type = Object(PyImport_ImportModule("torch")).attribute("Tensor").release();
    tensor_type = reinterpret_cast<PyTypeObject*>(type);
    storage_size = find_tensor_number("aoti_torch_get_storage_size");
    storage_offset = find_tensor_number("aoti_torch_get_storage_offset");
    if (storage_size != nullptr && storage_offset != nullptr) tensor_place = find_tensor_place(tensor_type);
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

TensorView view_by_exchange(const DlExchangeApi& api, PyObject* tensor) {
  DlTensor t;
  if (api.dltensor_from_py_object_no_sync(tensor, &t) != 0) throw PythonError();
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

// Returns an attribute, or a method, of a tensor as torch.Tensor has it, whatever a subclass says instead.
Object torchs_own(PyObject* tensor, const char* name) {
  PyObject* type = reinterpret_cast<PyObject*>(torch().tensor_type);
  const Object descriptor(PyObject_GetAttrString(type, name));
  return Object(PyObject_CallMethod(descriptor.get(), "__get__", "OO", tensor, type));
}

Object result_of(PyObject* tensor, const char* method) {
  return Object(PyObject_CallNoArgs(torchs_own(tensor, method).get()));
}

TensorView view_by_attributes(PyObject* tensor) {
  const Object shape = torchs_own(tensor, "shape"), strides = result_of(tensor, "stride");
  const int64_t ndim = torchs_own(tensor, "ndim").integer();
  std::vector<int64_t> sizes(2 * ndim);
  for (int64_t d = 0; d < ndim; ++d) {
    sizes[d] = shape.at(d).integer();
    sizes[ndim + d] = strides.at(d).integer();
  }
  kept_shapes.push_back(std::move(sizes));
  const std::string dtype = torchs_own(tensor, "dtype").text();
  TensorView view{reinterpret_cast<void*>(static_cast<uintptr_t>(result_of(tensor, "data_ptr").integer())),
                  kept_shapes.back().data(),
                  kept_shapes.back().data() + ndim,
                  static_cast<int32_t>(ndim),
                  kCodeOther,
                  static_cast<uint8_t>(8 * result_of(tensor, "element_size").integer()),
                  kOtherDevice};
  if (torchs_own(tensor, "is_cpu").integer() != 0) view.device = kCpu;
  if (torchs_own(tensor, "is_cuda").integer() != 0)
    view.device = static_cast<int>(result_of(tensor, "get_device").integer());
  if (dtype == "torch.float32" || dtype == "torch.float64" || dtype == "torch.float16") view.type_code = kCodeFloat;
  if (dtype == "torch.int64") view.type_code = kCodeInt;
  if (dtype == "torch.bfloat16") view.type_code = kCodeBFloat;
  if (dtype == "torch.uint8") view.type_code = kCodeUInt;
  return view;
}

// Where a tensor's elements begin in its storage, in elements, and how many bytes that has now.
struct StoragePlace {
  int64_t offset, bytes;
};

StoragePlace storage_place(const Torch& torch, PyObject* tensor) {
  StoragePlace place;
  if (torch.tensor_place != 0 && !attributes_forced) {
    void* at_tensor = reinterpret_cast<char*>(tensor) + torch.tensor_place;
    if (torch.storage_size(at_tensor, &place.bytes) == 0 && torch.storage_offset(at_tensor, &place.offset) == 0)
      return place;
  }
  place.offset = result_of(tensor, "storage_offset").integer();
  place.bytes = result_of(tensor, "untyped_storage").call("nbytes").integer();
  return place;
}

bool lies_in_storage(const Torch& torch, const TensorView& view, PyObject* tensor) {
  int64_t last = 0;
  for (int32_t d = 0; d < view.ndim; ++d) {
    if (view.shape[d] == 0) return true;
    last += (view.shape[d] - 1) * view.strides[d];
  }
  const StoragePlace place = storage_place(torch, tensor);
  const int64_t size = view.bits / 8;
  const auto begin = static_cast<uintptr_t>(place.offset * size);
  return (place.offset + last + 1) * size <= place.bytes && reinterpret_cast<uintptr_t>(view.data) != begin;
}

thread_local bool in_call = false;

}  // namespace

Call::Call() {
  if (in_call) {
    PyErr_SetString(PyExc_RuntimeError,
                    "a call of the compiled module must end before the next one on its thread begins (got one within "
                    "another); take no step in a property or method that a step reads");
    throw PythonError();
  }
  in_call = true;
}

Call::~Call() {
  in_call = false;
  kept_shapes.clear();
}

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
  const Torch& found = torch();
  if (!PyObject_TypeCheck(tensor, found.tensor_type)) {
    PyErr_Format(PyExc_TypeError, "a torch.Tensor is required (got %s)", Py_TYPE(tensor)->tp_name);
    throw PythonError();
  }
  const TensorView view =
      found.api && !attributes_forced ? view_by_exchange(*found.api, tensor) : view_by_attributes(tensor);
  if (!lies_in_storage(found, view, tensor)) {
    PyErr_SetString(PyExc_ValueError, "a tensor must have memory for its elements (got one whose storage was freed)");
    throw PythonError();
  }
  return view;
}

const char* tensor_access() {
  return torch().api && !attributes_forced ? "DLPack C exchange API" : "tensor attributes";
}

void force_attribute_access(bool force) { attributes_forced = force; }

}  // namespace childtune
