// Threads from the OpenMP runtime that torch has loaded, found by name at run time: nothing is linked, so one binary
// works beside libgomp, libomp and Intel's runtime, and a build needs no OpenMP flag. Without a runtime, each call
// starts threads of its own.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace childtune {
namespace {

constexpr int kMaxThreads = 64;

struct Job {
  std::atomic<int64_t> next{0};
  int64_t slices;
  void (*slice)(void*, int64_t);
  void* context;
};

void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.slices;) job.slice(job.context, i);
}

// The function that GCC calls for `#pragma omp parallel`; LLVM's and Intel's runtimes export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_gomp_parallel() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return found;
}

}  // namespace

void parallel_slices(int threads, int64_t slices, void (*slice)(void*, int64_t), void* context) {
  Job job;
  job.slices = slices;
  job.slice = slice;
  job.context = context;
  // More threads than processors are of no use, and starting very many ends the process. Asking how many there are
  // reads files of the system's, which takes as long as a step of some thousand weights.
  static const int most_threads = std::max(kMaxThreads, static_cast<int>(std::thread::hardware_concurrency()));
  threads = std::min(threads, most_threads);
  if (threads <= 1 || slices <= 1) return work(&job);
  if (GompParallel parallel = gomp_parallel()) return parallel(work, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &job);
  work(&job);
  for (std::thread& helper : helpers) helper.join();
}

const char* parallel_runtime() { return gomp_parallel() ? "OpenMP" : "std::thread"; }

}  // namespace childtune
