// The two ways to read a torch.Tensor. See tensor_view.h.
#include "python/tensor_view.h"

#include <deque>
#include <string>
#include <vector>

namespace py = pybind11;

namespace childtune {
namespace {

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

constexpr int32_t kDlCpu = 1;

struct Torch {
  PyTypeObject* tensor_type;
  const DlExchangeApi* api = nullptr;

  Torch() {
    const py::object type = py::module_::import("torch").attr("Tensor");
    tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    Py_INCREF(tensor_type);  // held for the life of the process
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* found = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
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
  if (torch().api->dltensor_from_py_object_no_sync(tensor, &t) != 0) throw py::error_already_set();
  return {static_cast<char*>(t.data) + t.byte_offset,
          t.shape,
          t.strides,
          t.ndim,
          t.type_code,
          t.bits,
          t.device_type == kDlCpu};
}

thread_local std::deque<std::vector<int64_t>> kept_shapes;  // a deque: growing moves no vector

TensorView view_by_attributes(PyObject* object) {
  const py::handle tensor(object);
  const auto shape = tensor.attr("shape").cast<py::tuple>();
  const auto strides = tensor.attr("stride")().cast<py::tuple>();
  const size_t ndim = shape.size();
  std::vector<int64_t> sizes(2 * ndim);
  for (size_t d = 0; d < ndim; ++d) {
    sizes[d] = shape[d].cast<int64_t>();
    sizes[ndim + d] = strides[d].cast<int64_t>();
  }
  kept_shapes.push_back(std::move(sizes));
  const std::string dtype = py::str(tensor.attr("dtype"));
  TensorView view{reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()),
                  kept_shapes.back().data(),
                  kept_shapes.back().data() + ndim,
                  static_cast<int32_t>(ndim),
                  kCodeOther,
                  static_cast<uint8_t>(8 * tensor.attr("element_size")().cast<int>()),
                  tensor.attr("is_cpu").cast<bool>()};
  if (dtype == "torch.float32" || dtype == "torch.float64" || dtype == "torch.float16") view.type_code = kCodeFloat;
  if (dtype == "torch.bfloat16") view.type_code = kCodeBFloat;
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
    throw py::type_error(std::string("a torch.Tensor is required (got ") + Py_TYPE(tensor)->tp_name + ")");
  }
  return torch().api && !attributes_forced ? view_by_exchange(tensor) : view_by_attributes(tensor);
}

void forget_views() { kept_shapes.clear(); }

const char* tensor_access() {
  return torch().api && !attributes_forced ? "DLPack C exchange API" : "tensor attributes";
}

void force_attribute_access(bool force) { attributes_forced = force; }

}  // namespace childtune
