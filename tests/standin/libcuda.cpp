// A stand-in for the CUDA driver: its one device, number -1, is the CPU, where it runs the kernels in loops. It checks
// how it is called, and refuses device code that is not its own, as a driver refuses that of another architecture.
#include <cstring>
#include <string>
#include <vector>

#include "../cpp/emulated_gpu.h"

using namespace childtune;

namespace {

constexpr int kDevice = -1, kNotFound = 500, kInvalid = 1, kInvalidImage = 200;
constexpr char kImage[] = "device code of the stand-in";
int device_handle = 17, context = 0, module_of_it = 0;
int pushed = 0;  // how many contexts are pushed

struct Kernel {
  std::string name;
  void (*run)(const Kernel& self, unsigned blocks, const void* argument);
  Kind kind;  // of a step's kernel; not used for others
};

void run_step(const Kernel& self, unsigned blocks, const void* argument) { emulate({self.kind, blocks}, argument); }
template <class Table, void (*emulated)(const Table&, uint32_t)>
void run(const Kernel&, unsigned blocks, const void* argument) {
  emulated(*static_cast<const Table*>(argument), blocks);
}
void emulate_norm_total(const NormTotal& norm, uint32_t) { sum_total(norm); }

std::vector<Kernel> make_kernels() {
  std::vector<Kernel> all;
  for (int n = 0; n < kKinds; ++n) {
    const Kind kind = kind_of_number(n);
    all.push_back({kernel_name(kind), run_step, kind});
  }
  all.push_back({"count_steps", run<ConstantsTable, emulate_count_steps>, {}});
  all.push_back({"norm_chunks", run<NormTable, emulate_norm_chunks>, {}});
  all.push_back({"norm_tensors", run<NormTable, emulate_norm_tensors>, {}});
  all.push_back({"norm_total", run<NormTotal, emulate_norm_total>, {}});
  all.push_back({"add_squares", run<SquaresArgument, emulate_add_squares>, {}});
  all.push_back({"count_digits", run<ScoreTable, emulate_count_digits>, {}});
  all.push_back({"write_above", run<ScoreTable, emulate_write_above>, {}});
  all.push_back({"add_ties", run<ScoreTable, emulate_add_ties>, {}});
  return all;
}
const std::vector<Kernel> kernels = make_kernels();

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? 0 : kInvalid; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorString(int result, const char** text) {
  *text = result == kInvalidImage ? "device kernel image is invalid" : "invalid argument";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = device_handle;
  return ordinal == kDevice ? 0 : 101;
}
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(16 * i + 15 - i);
  return device == device_handle ? 0 : kInvalid;
}
int cuDevicePrimaryCtxRetain(void** made_context, int device) {
  *made_context = &context;
  return device == device_handle ? 0 : kInvalid;
}
int cuCtxPushCurrent_v2(void* made_context) {
  ++pushed;
  return made_context == &context ? 0 : kInvalid;
}
int cuCtxPopCurrent_v2(void** made_context) {
  --pushed;
  *made_context = &context;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = &module_of_it;
  if (pushed != 1) return 201;
  return std::strcmp(static_cast<const char*>(image), kImage) == 0 ? 0 : kInvalidImage;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &module_of_it || pushed != 1) return kInvalid;
  for (const Kernel& kernel : kernels) {
    if (kernel.name != name) continue;
    *function = const_cast<Kernel*>(&kernel);
    return 0;
  }
  return kNotFound;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                   void** extra) {
  if (pushed != 1 || grid_y * grid_z * block_y * block_z != 1 || grid_x == 0 || block_x != kThreads ||
      shared_bytes != 0 || stream != reinterpret_cast<void*>(0x5) || extra != nullptr)
    return kInvalid;
  const Kernel& kernel = *static_cast<Kernel*>(function);
  kernel.run(kernel, grid_x, arguments[0]);
  return 0;
}
}
