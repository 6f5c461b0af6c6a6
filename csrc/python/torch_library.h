// The functions of the torch library in the process that read a tensor without Python: a call takes 2 to 10 ns, one
// through Python's interface of torch 50 to 150. They are found by name at run time, so that nothing is linked and no
// header of torch is needed. Where a name is missing, as on Windows or in another torch, callers ask Python.
#pragma once

#include <Python.h>

#include <cstdint>

namespace childtune {

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

constexpr int32_t kDlCpu = 1, kDlCuda = 2;

// All functions, or all nullptr. `tensor` is the address of an at::Tensor.
struct TorchLibrary {
  // Of torch's C interface for compiled models, which stays the same from release to release. They return 0 if they
  // could.
  int32_t (*storage_size)(void* tensor, int64_t* bytes) = nullptr;
  int32_t (*storage_offset)(void* tensor, int64_t* elements) = nullptr;
  int32_t (*device_type)(void* tensor, int32_t* type) = nullptr;  // 0: the CPU
  // Of its C++ interface. The kinds of its arguments are a part of a function's name there, so what is found takes
  // them.
  void (*to_dlpack)(const void* tensor, DlTensor* out) = nullptr;  // throws where DLPack cannot say what a tensor is
  bool (*is_negated)(const void* tensor) = nullptr;
  bool (*is_inference)(const void* tensor) = nullptr;
  void (*count_write)(const void* tensor) = nullptr;  // throws for a tensor of torch.inference_mode()
  Py_ssize_t place = 0;                               // of the at::Tensor within a torch.Tensor object

  explicit TorchLibrary(PyTypeObject* tensor_type);
  bool found() const { return place != 0; }
  void* tensor(PyObject* object) const { return reinterpret_cast<char*>(object) + place; }
};

}  // namespace childtune
