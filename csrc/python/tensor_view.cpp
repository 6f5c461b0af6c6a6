// The ways to read a torch.Tensor: by functions of torch's library, by the DLPack C exchange API, and by Python
// attributes.
#include "python/tensor_view.h"

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cpu/loops.h"
#include "python/torch_library.h"

namespace childtune {
namespace {

struct DlExchangeApi {
  uint32_t major, minor;
  void* previous_version;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DlTensor* out);
  void* current_work_stream;
};

// Returns a class. The reference is never dropped: the class must stay.
PyTypeObject* find_type(const char* module, const char* name) {
  return reinterpret_cast<PyTypeObject*>(Object(PyImport_ImportModule(module)).attribute(name).release());
}

struct Torch {
  PyTypeObject *tensor_type, *parameter_type;
  const TorchLibrary library;
  const DlExchangeApi* api = nullptr;

  Torch()
      : tensor_type(find_type("torch", "Tensor")),
        parameter_type(find_type("torch.nn", "Parameter")),
        library(tensor_type) {
    PyObject* type = reinterpret_cast<PyObject*>(tensor_type);
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

// The functions of torch's library, or nullptr if there are none.
const TorchLibrary* torch_library() {
  const TorchLibrary& library = torch().library;
  return library.found() && !attributes_forced ? &library : nullptr;
}

bool is_torchs_own(const PyTypeObject* type) { return type == torch().parameter_type || type == torch().tensor_type; }

// Both ways run the same function of torch. The library's own does not count references, which takes the GIL anew.
DlTensor read_by_dlpack(const DlExchangeApi& api, PyObject* tensor) {
  DlTensor t;
  if (const TorchLibrary* library = torch_library()) {
    try {
      library->to_dlpack(library->tensor(tensor), &t);
      return t;
    } catch (...) {  // the other way raises the error
    }
  }
  if (api.dltensor_from_py_object_no_sync(tensor, &t) != 0) throw PythonError();
  return t;
}

TensorView view_by_dlpack(const DlExchangeApi& api, PyObject* tensor) {
  const DlTensor t = read_by_dlpack(api, tensor);
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

StoragePlace storage_place(PyObject* tensor) {
  StoragePlace place;
  if (const TorchLibrary* library = torch_library()) {
    void* at_tensor = library->tensor(tensor);
    if (library->storage_size(at_tensor, &place.bytes) == 0 && library->storage_offset(at_tensor, &place.offset) == 0)
      return place;
  }
  place.offset = result_of(tensor, "storage_offset").integer();
  place.bytes = result_of(tensor, "untyped_storage").call("nbytes").integer();
  return place;
}

bool lies_in_storage(const TensorView& view, PyObject* tensor) {
  int64_t last = 0;
  for (int32_t d = 0; d < view.ndim; ++d) {
    if (view.shape[d] == 0) return true;
    last += (view.shape[d] - 1) * view.strides[d];
  }
  const StoragePlace place = storage_place(tensor);
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
  if (!is_torchs_own(Py_TYPE(tensor)) && !PyObject_TypeCheck(tensor, found.tensor_type)) {
    PyErr_Format(PyExc_TypeError, "a torch.Tensor is required (got %s)", Py_TYPE(tensor)->tp_name);
    throw PythonError();
  }
  const TensorView view =
      found.api && !attributes_forced ? view_by_dlpack(*found.api, tensor) : view_by_attributes(tensor);
  if (!lies_in_storage(view, tensor)) {
    PyErr_SetString(PyExc_ValueError, "a tensor must have memory for its elements (got one whose storage was freed)");
    throw PythonError();
  }
  return view;
}

void fetch_tensor(PyObject* object) {
  const TorchLibrary* library = torch_library();
  if (library == nullptr || !is_torchs_own(Py_TYPE(object))) return;
  const char* in_torch = *static_cast<const char**>(library->tensor(object));  // of 192 bytes, more or less
  for (int at = 0; at < 192; at += 64) CHILDTUNE_PREFETCH(in_torch + at);
}

bool is_plain_on_cpu(PyObject* object) {
  const TorchLibrary* library = torch_library();
  if (library == nullptr || !is_torchs_own(Py_TYPE(object))) return false;
  void* tensor = library->tensor(object);
  int32_t device_type;
  return library->device_type(tensor, &device_type) == 0 && device_type == 0 && !library->is_negated(tensor);
}

void count_writes(PyObject* tensors, Py_ssize_t count) {
  const TorchLibrary* library = torch_library();
  if (library == nullptr) {
    const Object of_torch = Object(PyImport_ImportModule("torch.autograd.graph")).attribute("increment_version");
    const Object written(PyTuple_GetSlice(tensors, 0, count));
    Object(PyObject_CallOneArg(of_torch.get(), written.get()));
    return;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    const void* tensor = library->tensor(PyTuple_GET_ITEM(tensors, i));
    if (!library->is_inference(tensor)) library->count_write(tensor);  // those of torch.inference_mode() have no count
  }
}

const char* tensor_access() {
  return torch().api && !attributes_forced ? "DLPack C exchange API" : "tensor attributes";
}

void force_attribute_access(bool force) { attributes_forced = force; }

}  // namespace childtune
