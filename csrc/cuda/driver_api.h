// The few functions of the CUDA driver that a launch needs, found by name at run time: nothing is linked and no CUDA
// header is needed, so that one build of the module serves machines with and without a GPU.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace childtune {

// Thrown if the driver is missing or refuses something; the message quotes the driver. Python gets it as
// childtune_fast.native.CudaError.
struct CudaError : std::runtime_error {
  explicit CudaError(const std::string& message, int code_ = 0) : std::runtime_error(message), code(code_) {}

  int code;            // the driver's CUresult; 0 if it was not the driver that refused
  bool begun = false;  // the GPU has been told to do a part of what was asked
};

// Kernels loaded onto one device: device code in its primary context, which is the one that torch uses.
class CudaKernels {
 public:
  // Loads those kernels of `names` that `image`, a cubin, a fatbin or PTX, has. An empty name stands for a kernel that
  // is not looked for. Throws CudaError.
  CudaKernels(int device, const std::string& image, const std::vector<std::string>& names);
  CudaKernels(const CudaKernels&) = delete;
  CudaKernels& operator=(const CudaKernels&) = delete;

  bool has(size_t function) const { return functions_.at(function) != nullptr; }

  // Launches the function of this number in `names` with one argument, by value. `stream` is the driver's handle; 0 is
  // the current context's default stream if that context is one of this device, else the primary context's. Leaves the
  // current context as it was. Throws CudaError.
  void launch(size_t function, const void* argument, unsigned blocks, unsigned threads, void* stream) const;

 private:
  int handle_ = 0;  // the driver's, of the device
  void* context_ = nullptr;
  std::vector<void*> functions_;
};

// Returns the highest CUDA version that the driver knows, as 1000 * major + 10 * minor; 0 without a driver.
int cuda_driver_version();

}  // namespace childtune
