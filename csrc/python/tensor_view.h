// Reads what the kernels need to know of a torch.Tensor, without a torch header: through functions of torch's library
// (torch_library.h) or the DLPack C exchange API where torch has them, else through the tensor's Python attributes.
// Whichever way, no address comes from the caller.
#pragma once

#include <Python.h>

#include <cstdint>

#include "python/python_object.h"

namespace childtune {

constexpr int kCpu = -1, kOtherDevice = -2;

// Valid while the tensor lives and keeps its shape. `shape` and `strides` count elements.
struct TensorView {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int32_t ndim;
  uint8_t type_code;  // DLPack's: 0 int, 1 unsigned, 2 float, 4 bfloat, 255 anything else
  uint8_t bits;
  int device;  // kCpu, a CUDA device's number, or kOtherDevice

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool on_cpu() const { return device == kCpu; }
  bool is(uint8_t code, uint8_t width) const { return type_code == code && bits == width; }
  bool same_shape(const TensorView& other) const;
  bool contiguous() const;  // elements lie in memory in logical order, without gaps
};

constexpr uint8_t kCodeInt = 0, kCodeUInt = 1, kCodeFloat = 2, kCodeBFloat = 4, kCodeOther = 255;

// One call of this module, on one thread, that reads tensors; its views are valid until it ends. A call that begins
// within another one, as when Python code that the other runs calls the module again, throws with RuntimeError set: it
// might take away what the other has read.
class Call {
 public:
  Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call();
};

// Reads `tensor`, in a Call. Throws with TypeError set for anything but a torch.Tensor with memory of its own, and with
// ValueError set if its storage has become smaller than its elements need, as `untyped_storage().resize_` makes it: a
// view of elements has their memory.
TensorView view_tensor(PyObject* tensor);

// Asks for the memory that view_tensor will read, if the object is a tensor.
void fetch_tensor(PyObject* object);

// Returns whether this is a torch.Tensor or torch.nn.Parameter, of no other class, on the CPU, and no lazily negated
// view. Says false of everything where torch's library cannot be asked.
bool is_plain_on_cpu(PyObject* object);

// Tells autograd of a write to each of the first `count` tensors of a tuple, as torch.autograd.graph.increment_version
// does: where a backward pass needs what was there before, it raises.
void count_writes(PyObject* tensors, Py_ssize_t count);

// Returns how tensors are read: "DLPack C exchange API" or "tensor attributes". Tests can force the attributes.
const char* tensor_access();
void force_attribute_access(bool force);

}  // namespace childtune
