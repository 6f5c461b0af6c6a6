// Radix select: a score becomes an integer key of the same order. One pass counts the keys' upper halves, which gives
// the upper half of the k-th key; a second counts the lower halves of the keys that share it; a third writes the bits.
// Each pass reads the scores in slices that threads take in turn. Each worker has counts of its own, and their sums do
// not depend on which worker took which slice.
#include "cpu/select.h"

#include <algorithm>
#include <atomic>

#include "core/score_key.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"

namespace childtune {
namespace {

constexpr int64_t kSliceElements = 128 * kPackedBlock;
constexpr size_t kWorthThreads = 4;  // slices: for fewer, waking other threads costs more than they save
constexpr int kMostWorkers = 32;     // the counts of each take half a megabyte
constexpr int64_t kBuckets = 1 << 16;

struct Slice {
  const float* scores;
  uint8_t* bits;
  int64_t count;
  int64_t tensor;
};

// Runs body(worker, slice) for every slice; a worker is never in two calls at once.
template <class Body>
void for_slices(const std::vector<Slice>& slices, int workers, Body body) {
  struct Context {
    const std::vector<Slice>& slices;
    Body& body;
    std::atomic<size_t> next;
  } context{slices, body, {0}};
  const auto work = [](void* argument, int64_t worker) {
    Context& c = *static_cast<Context*>(argument);
    for (size_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.slices.size();) c.body(worker, i);
  };
  parallel_slices(workers, workers, work, &context);
}

class Selection {
 public:
  Selection(const std::vector<ScoredTensor>& tensors, bool largest, int threads) : flip_(largest ? 0u : ~0u) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int64_t at = 0; at < tensors[t].numel; at += kSliceElements) {
        slices_.push_back({tensors[t].scores + at, tensors[t].bits + at / 8,
                           std::min(kSliceElements, tensors[t].numel - at), static_cast<int64_t>(t)});
      }
    }
    workers_ = slices_.size() < kWorthThreads ? 1 : std::clamp(threads, 1, kMostWorkers);
    counts_.resize(workers_ * kBuckets);
    ties_.resize(slices_.size());
  }

  // Returns the number of the first tensor with a NaN, or -1.
  int64_t run(int64_t k) {
    const int64_t nan = count_upper_halves();
    if (nan >= 0) return nan;
    int64_t left = k;
    const uint32_t upper = bucket_of(&left);
    count_lower_halves(upper);
    const uint32_t threshold = upper << 16 | bucket_of(&left);
    write_bits(threshold);
    add_ties(threshold, left);
    return -1;
  }

 private:
  int64_t count_upper_halves() {
    std::atomic<int64_t> first_nan{INT64_MAX};
    for_slices(slices_, workers_, [&](int64_t worker, size_t i) {
      const Slice& slice = slices_[i];
      if (!kernels_.count_upper_halves(slice.scores, slice.count, flip_, &counts_[worker * kBuckets])) return;
      int64_t first = first_nan.load();
      while (slice.tensor < first && !first_nan.compare_exchange_weak(first, slice.tensor)) {
      }
    });
    return first_nan == INT64_MAX ? -1 : first_nan.load();
  }

  void count_lower_halves(uint32_t upper) {
    std::fill(counts_.begin(), counts_.end(), 0);
    for_slices(slices_, workers_, [&](int64_t worker, size_t i) {
      kernels_.count_lower_halves(slices_[i].scores, slices_[i].count, flip_, upper, &counts_[worker * kBuckets]);
    });
  }

  // Returns the bucket that holds the `left`-th highest key, and subtracts from `left` the keys in higher buckets.
  uint32_t bucket_of(int64_t* left) const {
    for (uint32_t bucket = kBuckets - 1;; --bucket) {
      int64_t count = 0;
      for (int w = 0; w < workers_; ++w) count += counts_[w * kBuckets + bucket];
      if (count >= *left || bucket == 0) return bucket;
      *left -= count;
    }
  }

  // Sets the bits of the keys above the threshold, clears the others, and counts the keys that equal it.
  void write_bits(uint32_t threshold) {
    for_slices(slices_, workers_, [&](int64_t, size_t i) {
      const Slice& slice = slices_[i];
      ties_[i] = kernels_.write_above(slice.scores, slice.count, flip_, threshold, slice.bits);
    });
  }

  // Sets the bits of the first `left` keys that equal the threshold.
  void add_ties(uint32_t threshold, int64_t left) {
    for (size_t i = 0; i < slices_.size() && left > 0; ++i) {
      if (ties_[i] == 0) continue;
      for (int64_t j = 0; j < slices_[i].count && left > 0; ++j) {
        if (score_key(slices_[i].scores[j], flip_) != threshold) continue;
        slices_[i].bits[j / 8] |= static_cast<uint8_t>(1u << j % 8);
        --left;
      }
    }
  }

  const CpuKernels kernels_ = current_kernels();
  std::vector<Slice> slices_;
  std::vector<int64_t> counts_;  // of each worker, by bucket
  std::vector<int64_t> ties_;    // of each slice
  uint32_t flip_;
  int workers_;
};

}  // namespace

int64_t select_cpu(const std::vector<ScoredTensor>& tensors, int64_t k, bool largest, int threads) {
  return Selection(tensors, largest, threads).run(k);
}

}  // namespace childtune
