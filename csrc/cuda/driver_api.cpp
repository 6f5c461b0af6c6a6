// Finds the driver's functions, and calls them. Types and names are those of CUDA's driver API:
// https://docs.nvidia.com/cuda/cuda-driver-api/index.html
#include "cuda/driver_api.h"

#if defined(__unix__)
#include <dlfcn.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace childtune {
namespace {

using Result = int;  // CUresult; 0 is success
constexpr Result kNotFound = 500;

void* library() {
#if defined(__unix__)
  return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
#elif defined(_WIN32)
  return reinterpret_cast<void*>(LoadLibraryA("nvcuda.dll"));
#else
  return nullptr;
#endif
}

void* symbol(void* library, const char* name) {
#if defined(__unix__)
  return dlsym(library, name);
#elif defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
#else
  return nullptr;
#endif
}

struct Driver {
  Result (*init)(unsigned flags) = nullptr;
  Result (*version)(int* version) = nullptr;
  Result (*error_string)(Result result, const char** text) = nullptr;
  Result (*device_get)(int* device, int ordinal) = nullptr;
  Result (*device_uuid)(unsigned char* uuid, int device) = nullptr;  // nullptr if the driver has none
  Result (*primary_context_retain)(void** context, int device) = nullptr;
  Result (*context_push)(void* context) = nullptr;
  Result (*context_pop)(void** context) = nullptr;
  Result (*module_load)(void** module, const void* image) = nullptr;
  Result (*module_function)(void** function, void* module, const char* name) = nullptr;
  Result (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                          void** extra) = nullptr;
  std::string problem;  // why it cannot be used; empty if it can

  Driver() {
    void* found = library();
    if (found == nullptr) {
      problem = "there is no CUDA driver";
      return;
    }
    find(found, "cuInit", &init);
    find(found, "cuDriverGetVersion", &version);
    find(found, "cuGetErrorString", &error_string);
    find(found, "cuDeviceGet", &device_get);
    find(found, "cuDevicePrimaryCtxRetain", &primary_context_retain);
    find(found, "cuCtxPushCurrent_v2", &context_push);
    find(found, "cuCtxPopCurrent_v2", &context_pop);
    find(found, "cuModuleLoadData", &module_load);
    find(found, "cuModuleGetFunction", &module_function);
    find(found, "cuLaunchKernel", &launch_kernel);
    // Only this one tells apart the instances of a GPU that is partitioned (MIG).
    device_uuid = reinterpret_cast<decltype(device_uuid)>(symbol(found, "cuDeviceGetUuid_v2"));
    if (device_uuid == nullptr) device_uuid = reinterpret_cast<decltype(device_uuid)>(symbol(found, "cuDeviceGetUuid"));
    if (problem.empty() && init(0) != 0) problem = "the CUDA driver cannot be initialised";
  }

  template <class Function>
  void find(void* found, const char* name, Function* to) {
    *to = reinterpret_cast<Function>(symbol(found, name));
    if (*to == nullptr) problem = std::string("the CUDA driver has no ") + name;
  }

  void check(Result result, const char* what) const {
    if (result == 0) return;
    const char* text = nullptr;
    if (error_string(result, &text) != 0 || text == nullptr) text = "unknown error";
    throw CudaError(std::string(what) + " failed: " + text + " (CUDA error " + std::to_string(result) + ")");
  }
};

const Driver& driver() {
  static const Driver* const found = new Driver;  // never destroyed: kernels may outlive static objects
  return *found;
}

std::string hexadecimal(const unsigned char* bytes, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += "0123456789abcdef"[bytes[i] >> 4];
    text += "0123456789abcdef"[bytes[i] & 15];
  }
  return text;
}

// Makes a context current for the life of this object.
class CurrentContext {
 public:
  explicit CurrentContext(void* context) { driver().check(driver().context_push(context), "cuCtxPushCurrent"); }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    void* ignored;
    driver().context_pop(&ignored);
  }
};

}  // namespace

CudaKernels::CudaKernels(int device, const std::string& image, const std::vector<std::string>& names) {
  const Driver& cuda = driver();
  if (!cuda.problem.empty()) throw CudaError(cuda.problem);
  int handle = 0;
  cuda.check(cuda.device_get(&handle, device), "cuDeviceGet");
  unsigned char uuid[16];
  if (cuda.device_uuid != nullptr) {
    cuda.check(cuda.device_uuid(uuid, handle), "cuDeviceGetUuid");
    uuid_ = hexadecimal(uuid, sizeof uuid);
  }
  cuda.check(cuda.primary_context_retain(&context_, handle), "cuDevicePrimaryCtxRetain");
  const CurrentContext current(context_);
  void* module = nullptr;  // it and the context are kept for the life of the process, as torch keeps its own
  cuda.check(cuda.module_load(&module, image.c_str()), "cuModuleLoadData");
  for (const std::string& name : names) {
    functions_.push_back(nullptr);
    const Result result = cuda.module_function(&functions_.back(), module, name.c_str());
    if (result != kNotFound) cuda.check(result, "cuModuleGetFunction");
  }
}

void CudaKernels::launch(size_t function, const void* argument, unsigned blocks, unsigned threads, void* stream) const {
  const CurrentContext current(context_);
  void* arguments[] = {const_cast<void*>(argument)};
  driver().check(
      driver().launch_kernel(functions_.at(function), blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr),
      "cuLaunchKernel");
}

int cuda_driver_version() {
  int version = 0;
  const Driver& cuda = driver();
  return cuda.problem.empty() && cuda.version(&version) == 0 ? version : 0;
}

}  // namespace childtune
