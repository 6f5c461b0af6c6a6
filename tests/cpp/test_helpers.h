// What the tests of csrc/core and csrc/cpu share: failures, noise, and the arrays of a parameter.
#pragma once

#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "core/dtypes.h"
#include "core/philox.h"
#include "cpu/driver.h"

using namespace childtune;

inline int failures = 0;

inline void expect(bool holds, const char* what, long long detail = 0) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%lld)\n", what, detail);
}

inline float noise(uint32_t i, uint32_t stream) {
  return static_cast<float>(static_cast<int32_t>(philox4x32_10(i, stream, 0, 0, 7, 7).word[0])) * 0x1p-31f;
}

inline DType dtype_of(float) { return DType::kFloat32; }
inline DType dtype_of(double) { return DType::kFloat64; }
inline DType dtype_of(BFloat16) { return DType::kBFloat16; }
inline DType dtype_of(Float16) { return DType::kFloat16; }

inline double sum_of(const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

inline double share_of(const StepItem& item) { return static_cast<double>(item.keep_threshold) / kKeepAll; }

// Arrays of one parameter, whose elements lie `stride` apart. The last element is the last of its memory, so that the
// sanitizers see an access beyond it.
template <class P>
struct Arrays {
  using T = typename ComputeType<P>::type;
  std::vector<P> param, grad;
  std::vector<T> state[3];
  int64_t numel, stride;
  std::vector<int64_t> layout, squares_layout;

  Arrays(int64_t n, int64_t s) : numel(n), stride(s), layout{1, n, s, s, s, s, s} {
    const size_t length = n == 0 ? 0 : static_cast<size_t>((n - 1) * s + 1);
    param.resize(length);
    grad.resize(length);
    for (size_t i = 0; i < length; ++i) {
      store(param[i], T(noise(i, 0)));
      store(grad[i], T(noise(i, 1)));
    }
    for (int k = 0; k < 3; ++k) {
      for (size_t i = 0; i < length; ++i) state[k].push_back(std::fabs(T(noise(i, 2 + k))));
    }
  }

  // Makes the state compact, that of a child network of `count` weights, with no room beside it.
  void keep_child(int64_t count) {
    for (auto& values : state) values = {values.begin(), values.begin() + count};
  }

  // The gradient, with scores that are not strided.
  SquaresItem squares_item(float* score) {
    squares_layout = {1, numel, stride};
    return {grad.data(), score, numel, stride == 1 ? nullptr : squares_layout.data(), dtype_of(P{})};
  }

  StepItem item(bool masked, bool amsgrad, MaskSlice slice) {
    StepItem it{};
    void* data[kStreams] = {param.data(), grad.data(), state[0].data(), state[1].data(), state[2].data()};
    for (int k = 0; k < kStreams; ++k) it.data[k] = data[k];
    if (!amsgrad) it.data[kMaxExpAvgSq] = nullptr;
    it.numel = numel;
    it.layout = stride == 1 ? nullptr : layout.data();
    it.dtype = dtype_of(P{});
    it.masked = masked;
    it.keep_threshold = masked ? 19661 : kKeepAll;
    it.key = {0x123456789ABCDEFull, 3, 5};
    it.slice = slice;
    const HyperParams h{1e-2, 0.9, 0.999, 1e-8, 0.1, -0.5, share_of(it), false};
    it.constants = step_constants(h, 3);
    return it;
  }
};

// The mask of a child network that has about so many percent of n weights.
struct ChildMask {
  std::vector<uint8_t> bits;
  std::vector<int64_t> offsets, children;  // children: the weights, by index

  ChildMask(int64_t n, uint32_t percent) : bits(mask_bytes(n)) {
    for (int64_t i = 0; i < n; ++i) {
      if (i % kPackedBlock == 0) offsets.push_back(count());
      if (philox4x32_10(static_cast<uint32_t>(i), 0, 0, 0, 3, 4).word[0] % 100 >= percent) continue;
      bits[i / 8] |= static_cast<uint8_t>(1 << i % 8);
      children.push_back(i);
    }
    offsets.push_back(count());
  }

  int64_t count() const { return static_cast<int64_t>(children.size()); }
  PackedMask packed() const { return {bits.data(), offsets.data(), count()}; }
};

template <class V>
bool same_bytes(const V& a, const V& b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
}
