// All parameters form one line of elements, cut into slices of equal size: a thousand tiny tensors and one huge one are
// the same work, and there is one parallel region per call.
#include "cpu/driver.h"

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace childtune {
namespace {

constexpr int64_t kWorthThreads = 1 << 18;  // elements: for fewer, waking other threads costs more than they save
// Elements of a slice: large, because memory is slow at the beginning of each, but with enough slices for threads of
// different speed to end together.
constexpr int64_t kLeastSlice = 1 << 15, kMostSlice = 1 << 17, kSlicesPerThread = 16;

#if defined(__x86_64__) && defined(__GNUC__)
// Returns whether there are the F16C instructions, for which older compilers' __builtin_cpu_supports has no name.
bool converts_halves() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

std::vector<CpuKernels> supported_kernels() {
  std::vector<CpuKernels> all{baseline::kernels()};
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2") && converts_halves()) all.push_back(avx2::kernels());
#if !defined(CHILDTUNE_NO_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back(avx512::kernels());
#endif
#endif
  return all;
}

CpuKernels& current() {
  static CpuKernels kernels = supported_kernels().back();
  return kernels;
}

// The line of elements. Each parameter starts at a multiple of `unit`, a power of two, and so do slices. Item: StepItem
// or SquaresItem.
template <class Item>
class Line {
 public:
  Line(const Item* items, size_t count, int64_t unit, int threads, std::vector<int64_t>* starts)
      : items_(items), count_(count), starts_(*starts) {
    starts_.clear();
    int64_t at = 0;
    for (size_t i = 0; i < count; ++i) {
      starts_.push_back(at);
      at += (items[i].numel + unit - 1) / unit * unit;
    }
    length_ = at;
    threads_ = length_ < kWorthThreads ? 1 : std::max(threads, 1);
    slice_ = std::clamp(length_ / (kSlicesPerThread * threads_), kLeastSlice, kMostSlice) / kLeastSlice * kLeastSlice;
  }

  int64_t length() const { return length_; }
  int64_t start(size_t item) const { return starts_[item]; }
  int64_t slices() const { return (length_ + slice_ - 1) / slice_; }
  int threads() const { return threads_; }

  // Calls visit(item's number, begin, end) for the parts of parameters that slice `i` covers.
  template <class Visit>
  void visit_slice(int64_t i, Visit visit) const {
    const int64_t begin = i * slice_, end = std::min(begin + slice_, length_);
    size_t k = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; k < count_ && starts_[k] < end; ++k) {
      const int64_t from = std::max<int64_t>(begin - starts_[k], 0), to = std::min(end - starts_[k], items_[k].numel);
      if (from < to) visit(k, from, to);
    }
  }

 private:
  const Item* items_;
  size_t count_;
  std::vector<int64_t>& starts_;
  int64_t length_, slice_;
  int threads_;
};

// Calls body(item's number, begin, end) for all parts of all parameters, on the line's threads.
template <class Item, class Body>
void parallel_over(const Line<Item>& line, Body body) {
  struct Context {
    const Line<Item>& line;
    Body& body;
  } context{line, body};
  const auto slice = [](void* argument, int64_t i) {
    const Context& c = *static_cast<Context*>(argument);
    c.line.visit_slice(i, c.body);
  };
  parallel_slices(line.threads(), line.slices(), slice, &context);
}

// Sums by halving, as if padded with zeros to a power of two. Overwrites its input.
double sum_by_halving(double* values, int64_t count) {
  int64_t half = 1;
  while (half < count) half *= 2;
  for (half /= 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i + half < count; ++i) values[i] += values[i + half];
    count = std::min(count, half);
  }
  return count == 0 ? 0.0 : values[0];
}

}  // namespace

void step_cpu(const std::vector<StepItem>& items, int threads) {
  thread_local std::vector<int64_t> starts;  // kept, so that a step allocates nothing
  const CpuKernels kernels = current_kernels();
  const Line line(items.data(), items.size(), kMaskBlock, threads, &starts);
  parallel_over(line, [&](size_t k, int64_t begin, int64_t end) { kernels.step(items[k], begin, end); });
}

std::vector<double> sums_of_squares_cpu(const std::vector<StepItem>& items, int threads) {
  thread_local std::vector<int64_t> starts;
  thread_local std::vector<double> chunk_sums;
  const CpuKernels kernels = current_kernels();
  const Line line(items.data(), items.size(), kNormChunk, threads, &starts);
  chunk_sums.resize(line.length() / kNormChunk);
  double* sums = chunk_sums.data();
  parallel_over(line, [&](size_t k, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kNormChunk) {
      sums[(line.start(k) + at) / kNormChunk] = kernels.sum_of_squares(items[k], at, std::min(at + kNormChunk, end));
    }
  });
  std::vector<double> totals;
  totals.reserve(items.size());
  for (size_t k = 0; k < items.size(); ++k) {
    const int64_t chunks = (items[k].numel + kNormChunk - 1) / kNormChunk;
    totals.push_back(sum_by_halving(sums + line.start(k) / kNormChunk, chunks));
  }
  return totals;
}

bool accumulate_squares_cpu(const SquaresItem& item, double weight, double grad_factor, int threads) {
  thread_local std::vector<int64_t> starts;
  const CpuKernels kernels = current_kernels();
  const Line line(&item, 1, kMaskBlock, threads, &starts);
  std::atomic<bool> finite{true};
  parallel_over(line, [&](size_t, int64_t begin, int64_t end) {
    if (!kernels.accumulate_squares(item, weight, grad_factor, begin, end)) finite = false;
  });
  return finite;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : supported_kernels()) names.emplace_back(kernels.name);
  return names;
}

std::string instruction_set() { return current().name; }

CpuKernels current_kernels() { return current(); }

bool set_instruction_set(const std::string& name) {
  for (const CpuKernels& kernels : supported_kernels()) {
    if (name == kernels.name) {
      current() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace childtune
