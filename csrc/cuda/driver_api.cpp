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

// Returns why `library` has just returned nullptr.
std::string why_no_library() {
#if defined(__unix__)
  const char* why = dlerror();
  return why == nullptr ? "no reason was given" : why;
#elif defined(_WIN32)
  return "nvcuda.dll: error " + std::to_string(GetLastError());
#else
  return "no system that CUDA supports";
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
  Result (*primary_context_retain)(void** context, int device) = nullptr;
  Result (*context_push)(void* context) = nullptr;
  Result (*context_pop)(void** context) = nullptr;
  Result (*context_current)(void** context) = nullptr;
  Result (*context_device)(int* device) = nullptr;
  Result (*module_load)(void** module, const void* image) = nullptr;
  Result (*module_function)(void** function, void* module, const char* name) = nullptr;
  Result (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                          void** extra) = nullptr;
  std::string problem;  // why it cannot be used; empty if it can
  Result problem_code = 0;

  Driver() {
    void* found = library();
    if (found == nullptr) {
      problem = "there is no CUDA driver (" + why_no_library() + ")";
      return;
    }
    find(found, "cuInit", &init);
    find(found, "cuDriverGetVersion", &version);
    find(found, "cuGetErrorString", &error_string);
    find(found, "cuDeviceGet", &device_get);
    find(found, "cuDevicePrimaryCtxRetain", &primary_context_retain);
    find(found, "cuCtxPushCurrent_v2", &context_push);
    find(found, "cuCtxPopCurrent_v2", &context_pop);
    find(found, "cuCtxGetCurrent", &context_current);
    find(found, "cuCtxGetDevice", &context_device);
    find(found, "cuModuleLoadData", &module_load);
    find(found, "cuModuleGetFunction", &module_function);
    find(found, "cuLaunchKernel", &launch_kernel);
    if (!problem.empty()) return;
    problem_code = init(0);
    if (problem_code != 0) problem = sentence(problem_code, "cuInit");
  }

  template <class Function>
  void find(void* found, const char* name, Function* to) {
    *to = reinterpret_cast<Function>(symbol(found, name));
    if (*to == nullptr) problem = std::string("the CUDA driver has no ") + name;
  }

  std::string sentence(Result result, const char* what) const {
    const char* text = nullptr;
    if (error_string(result, &text) != 0 || text == nullptr) text = "unknown error";
    return std::string(what) + " failed: " + text + " (CUDA error " + std::to_string(result) + ")";
  }

  void check(Result result, const char* what) const {
    if (result != 0) throw CudaError(sentence(result, what), result);
  }
};

const Driver& driver() {
  static const Driver* const found = new Driver;  // never destroyed: kernels may outlive static objects
  return *found;
}

// Returns whether the current context is one of a device, by the driver's handle.
bool is_current(int device) {
  void* context = nullptr;
  int its_device = 0;
  return driver().context_current(&context) == 0 && context != nullptr && driver().context_device(&its_device) == 0 &&
         its_device == device;
}

// Makes a context current for the life of this object, if it is wanted.
class CurrentContext {
 public:
  CurrentContext(void* context, bool wanted) : pushed_(wanted) {
    if (pushed_) driver().check(driver().context_push(context), "cuCtxPushCurrent");
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    void* ignored;
    if (pushed_) driver().context_pop(&ignored);
  }

 private:
  bool pushed_;
};

}  // namespace

CudaKernels::CudaKernels(int device, const std::string& image, const std::vector<std::string>& names) {
  const Driver& cuda = driver();
  if (!cuda.problem.empty()) throw CudaError(cuda.problem, cuda.problem_code);
  cuda.check(cuda.device_get(&handle_, device), "cuDeviceGet");
  cuda.check(cuda.primary_context_retain(&context_, handle_), "cuDevicePrimaryCtxRetain");
  const CurrentContext primary(context_, true);
  void* module = nullptr;  // it and the context are kept for the life of the process, as torch keeps its own
  cuda.check(cuda.module_load(&module, image.c_str()), "cuModuleLoadData");
  for (const std::string& name : names) {
    functions_.push_back(nullptr);
    if (name.empty()) continue;
    const Result result = cuda.module_function(&functions_.back(), module, name.c_str());
    if (result != kNotFound) cuda.check(result, "cuModuleGetFunction");
  }
}

// Mostly the primary context is current, since torch makes it so; in a thread that torch has not used, none is. A green
// context of the device, which has a part of its multiprocessors and default streams of its own, stays: torch's stream
// 0 is its stream. cuCtxFromGreenCtx says that it is the primary context with other resources, so the functions loaded
// there are launched in it.
void CudaKernels::launch(size_t function, const void* argument, unsigned blocks, unsigned threads, void* stream) const {
  const CurrentContext primary(context_, !is_current(handle_));
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
