// Radix select: a score becomes an integer key of the same order. One pass counts the keys' upper halves, which gives
// the upper half of the k-th key; a second counts the lower halves of the keys that share it; a third writes the bits.
// All of them read the scores in slices that threads take in turn; counts do not depend on who counted.
#include "cpu/selection.h"

#include <algorithm>
#include <atomic>

#include "core/compiler.h"
#include "cpu/parallel.h"

namespace childtune {
namespace {

constexpr int64_t kSliceElements = 64 * kRankBlock;
constexpr size_t kWorthThreads = 8;  // slices: below that, waking other threads costs more than they take over
constexpr int kMostWorkers = 32;     // each has counts of its own: half a megabyte
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr int64_t kBuckets = 1 << 16;
constexpr int64_t kFew = 32;

struct Slice {
  const float* scores;
  uint8_t* bits;
  int64_t count;
  int64_t tensor;
};

// The key as an unsigned number: magnitudes, signed, are in order. `flip` is 0, or -1 to turn the order around.
CHILDTUNE_INLINE uint32_t key_of(float score, uint32_t flip) {
  const uint32_t bits = bit_cast<uint32_t>(score);
  const uint32_t negate = (0u - (bits >> 31)) ^ flip;
  return (((bits & 0x7FFFFFFFu) ^ negate) - negate) + 0x80000000u;
}

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

  // The first tensor with a NaN, or -1.
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
      int64_t* counts = &counts_[worker * kBuckets];
      bool has_nan = false;
      for (int64_t at = 0; at < slice.count; at += kRankBlock) {
        uint32_t keys[kRankBlock];
        const int64_t count = read_keys(slice, at, keys);
        uint32_t beyond = 0;  // the sign bit of infinity minus a NaN's magnitude
        for (int64_t j = 0; j < count; ++j) {
          beyond |= kInfinity - (bit_cast<uint32_t>(slice.scores[at + j]) & 0x7FFFFFFFu);
        }
        has_nan |= beyond >> 31;
        for (int64_t j = 0; j < count; ++j) ++counts[keys[j] >> 16];
      }
      if (!has_nan) return;
      int64_t first = first_nan.load();
      while (slice.tensor < first && !first_nan.compare_exchange_weak(first, slice.tensor)) {
      }
    });
    return first_nan == INT64_MAX ? -1 : first_nan.load();
  }

  void count_lower_halves(uint32_t upper) {
    std::fill(counts_.begin(), counts_.end(), 0);
    for_slices(slices_, workers_, [&](int64_t worker, size_t i) {
      int64_t* counts = &counts_[worker * kBuckets];
      for (int64_t at = 0; at < slices_[i].count; at += kRankBlock) {
        uint32_t keys[kRankBlock];
        const int64_t count = read_keys(slices_[i], at, keys);
        std::fill(keys + count, keys + kRankBlock, ~upper << 16);  // in another bucket
        for (int64_t from = 0; from < count; from += kFew) {
          uint32_t found = 0;  // few keys share the bucket: most groups are passed over by vectors
          for (int64_t j = from; j < from + kFew; ++j) found |= keys[j] >> 16 == upper;
          if (!found) continue;
          for (int64_t j = from; j < from + kFew; ++j) {
            if (keys[j] >> 16 == upper) ++counts[keys[j] & 0xFFFFu];
          }
        }
      }
    });
  }

  // The bucket that holds the `left`-th highest key; subtracts from `left` what lies in higher ones.
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
      int64_t ties = 0;
      for (int64_t at = 0; at < slices_[i].count; at += kRankBlock) {
        uint32_t keys[kRankBlock];
        const int64_t count = read_keys(slices_[i], at, keys);
        std::fill(keys + count, keys + kRankBlock, 0u);  // below every score
        uint32_t equal = 0;
        for (uint32_t key : keys) equal += key == threshold;
        ties += equal;
        uint8_t above[kRankBlock];
        for (int64_t j = 0; j < kRankBlock; ++j) above[j] = keys[j] > threshold;
        for (int64_t byte = 0; byte < kRankBlock / 8; ++byte) {
          uint64_t flags = 0;  // flag j of eight in bits 8 j
          for (int j = 0; j < 8; ++j) flags |= uint64_t{above[8 * byte + j]} << (8 * j);
          slices_[i].bits[at / 8 + byte] = static_cast<uint8_t>(flags * 0x0102040810204080u >> 56);  // in bit j
        }
      }
      ties_[i] = ties;
    });
  }

  // Sets the bits of the first `left` keys that equal the threshold.
  void add_ties(uint32_t threshold, int64_t left) {
    for (size_t i = 0; i < slices_.size() && left > 0; ++i) {
      if (ties_[i] == 0) continue;
      for (int64_t j = 0; j < slices_[i].count && left > 0; ++j) {
        if (key_of(slices_[i].scores[j], flip_) != threshold) continue;
        slices_[i].bits[j / 8] |= static_cast<uint8_t>(1u << j % 8);
        --left;
      }
    }
  }

  // Writes the keys of the block at `at`, and returns how many they are.
  int64_t read_keys(const Slice& slice, int64_t at, uint32_t* keys) const {
    const int64_t count = std::min(kRankBlock, slice.count - at);
    for (int64_t j = 0; j < count; ++j) keys[j] = key_of(slice.scores[at + j], flip_);
    return count;
  }

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
