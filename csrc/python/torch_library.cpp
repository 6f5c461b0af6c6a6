// Finds the functions of torch_library.h, and where in a torch.Tensor object the at::Tensor is.
#include "python/torch_library.h"

#include <cstring>

#include "python/python_object.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace childtune {
namespace {

void* loaded_library() {
#if defined(__unix__) || defined(__APPLE__)
  for (const char* name : {"libtorch_cpu.so", "@rpath/libtorch_cpu.dylib"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);  // never closed, so that what is found stays
    if (library != nullptr) return library;
  }
#endif
  return nullptr;
}

template <class Function>
bool find(void* library, const char* name, Function* function) {
#if defined(__unix__) || defined(__APPLE__)
  *function = reinterpret_cast<Function>(dlsym(library, name));
#endif
  return *function != nullptr;
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

}  // namespace

TorchLibrary::TorchLibrary(PyTypeObject* tensor_type) {
  void* library = loaded_library();
  if (library == nullptr) return;
  const bool all = find(library, "aoti_torch_get_storage_size", &storage_size) &&
                   find(library, "aoti_torch_get_storage_offset", &storage_offset) &&
                   find(library, "aoti_torch_get_device_type", &device_type) &&
                   find(library, "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor", &to_dlpack) &&
                   find(library, "_ZN2at6native6is_negERKNS_6TensorE", &is_negated) &&
                   find(library, "_ZN2at6native12is_inferenceERKNS_6TensorE", &is_inference) &&
                   find(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &count_write);
  if (all) place = find_tensor_place(tensor_type);
}

}  // namespace childtune
