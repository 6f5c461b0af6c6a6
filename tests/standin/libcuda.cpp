// A stand-in for the CUDA driver: its one device, number -1, is the CPU, where it runs the kernels in loops. It checks
// how it is called, and refuses device code that is not its own, as a driver refuses that of another architecture.
//
// Two environment variables are read at each call, so that a test may change them: STANDIN_FAILS="cuLaunchKernel 2 3
// 700" makes the second and the third call of that function, counted from when the variable got this value, fail with
// the code 700; STANDIN_VERSION is the driver's version. A test finds the contexts, and the one in which a kernel was
// launched last, by the functions whose names begin with standin_.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../cpp/emulated_gpu.h"

using namespace childtune;

namespace {

constexpr int kDevice = -1, kNotFound = 500, kInvalid = 1, kInvalidContext = 201, kInvalidImage = 200;
constexpr char kImage[] = "device code of the stand-in";
constexpr int kDeviceHandle = 17;
enum : int { kPrimary, kGreen, kOfAnotherDevice, kContexts };
int contexts[kContexts];  // only their addresses are used
int module_of_it = 0;
void* launched_in = nullptr;
thread_local std::vector<void*> current;  // the last one is the current context

void* current_context() { return current.empty() ? nullptr : current.back(); }
bool is_of_device(const void* context) { return context == &contexts[kPrimary] || context == &contexts[kGreen]; }

// Returns the code with which this call of a function must fail, or 0.
int failure(const char* function) {
  static std::string known;
  static int calls = 0;
  const char* wanted = std::getenv("STANDIN_FAILS");
  if (wanted == nullptr || known != wanted) calls = 0;
  known = wanted == nullptr ? "" : wanted;
  char name[64] = "";
  int first = 0, last = 0, code = 0;
  if (std::sscanf(known.c_str(), "%63s %d %d %d", name, &first, &last, &code) != 4 || std::strcmp(name, function) != 0)
    return 0;
  ++calls;
  return first <= calls && calls <= last ? code : 0;
}

int version() {
  const char* wanted = std::getenv("STANDIN_VERSION");
  return wanted == nullptr ? 13000 : std::atoi(wanted);
}

struct Kernel {
  std::string name;
  size_t bytes;  // of its argument
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
    alignas(16) static const unsigned char any[kLargeArguments] = {};
    size_t bytes = 0;
    visit_table(kind, any, [&](const auto& table, auto) { bytes = sizeof table; });
    all.push_back({kernel_name(kind), bytes, run_step, kind});
  }
  all.push_back({"count_steps", sizeof(ConstantsTable), run<ConstantsTable, emulate_count_steps>, {}});
  all.push_back({"norm_chunks", sizeof(NormTable), run<NormTable, emulate_norm_chunks>, {}});
  all.push_back({"norm_tensors", sizeof(NormTable), run<NormTable, emulate_norm_tensors>, {}});
  all.push_back({"norm_total", sizeof(NormTotal), run<NormTotal, emulate_norm_total>, {}});
  all.push_back({"add_squares", sizeof(SquaresArgument), run<SquaresArgument, emulate_add_squares>, {}});
  all.push_back({"count_digits", sizeof(ScoreTable), run<ScoreTable, emulate_count_digits>, {}});
  all.push_back({"write_above", sizeof(ScoreTable), run<ScoreTable, emulate_write_above>, {}});
  all.push_back({"add_ties", sizeof(ScoreTable), run<ScoreTable, emulate_add_ties>, {}});
  return all;
}
const std::vector<Kernel> kernels = make_kernels();

}  // namespace

extern "C" {

void* standin_context(int number) { return &contexts[number]; }
void* standin_launched_in() { return launched_in; }

int cuInit(unsigned flags) { return flags == 0 ? failure("cuInit") : kInvalid; }
int cuDriverGetVersion(int* found) {
  *found = version();
  return 0;
}
int cuGetErrorString(int result, const char** text) {
  switch (result) {
    case 2:
      *text = "out of memory";
      return 0;
    case kInvalidImage:
      *text = "device kernel image is invalid";
      return 0;
    case 700:
      *text = "an illegal memory access was encountered";
      return 0;
    default:
      *text = "invalid argument";
      return 0;
  }
}
int cuDeviceGet(int* device, int ordinal) {
  *device = kDeviceHandle;
  return ordinal == kDevice ? failure("cuDeviceGet") : 101;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[kPrimary];
  return device == kDeviceHandle ? failure("cuDevicePrimaryCtxRetain") : kInvalid;
}
int cuCtxPushCurrent_v2(void* context) {
  if (const int code = failure("cuCtxPushCurrent_v2")) return code;
  current.push_back(context);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current_context();
  return 0;
}
int cuCtxGetDevice(int* device) {
  if (current.empty()) return kInvalidContext;
  *device = is_of_device(current.back()) ? kDeviceHandle : kDeviceHandle + 1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = &module_of_it;
  if (current_context() != &contexts[kPrimary]) return kInvalidContext;
  if (const int code = failure("cuModuleLoadData")) return code;
  return std::strcmp(static_cast<const char*>(image), kImage) == 0 ? 0 : kInvalidImage;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &module_of_it || current_context() != &contexts[kPrimary]) return kInvalid;
  if (const int code = failure("cuModuleGetFunction")) return code;
  for (const Kernel& kernel : kernels) {
    if (kernel.name != name) continue;
    // As drivers of CUDA 12.0 do, it refuses a kernel whose argument is larger than it knows.
    if (kernel.bytes > kSmallArguments && version() < 12010) return kInvalid;
    *function = const_cast<Kernel*>(&kernel);
    return 0;
  }
  return kNotFound;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                   void** extra) {
  if (!is_of_device(current_context()) || grid_y * grid_z * block_y * block_z != 1 || grid_x == 0 ||
      block_x != kThreads || shared_bytes != 0 || stream != reinterpret_cast<void*>(0x5) || extra != nullptr)
    return kInvalid;
  if (const int code = failure("cuLaunchKernel")) return code;
  const Kernel& kernel = *static_cast<Kernel*>(function);
  // The driver copies as many bytes as the kernel's parameter has, and no more.
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  const std::vector<unsigned char> argument(bytes, bytes + kernel.bytes);
  launched_in = current_context();
  kernel.run(kernel, grid_x, argument.data());
  return 0;
}
}
