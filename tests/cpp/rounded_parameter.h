// A parameter with state in fewer bits, or with weights that are rounded stochastically, and its step in a plain loop
// over core's scalar functions: what every kernel that rounds is compared with.
#pragma once

#include <algorithm>

#include "core/adamw.h"
#include "core/codes.h"
#include "core/rounding.h"
#include "test_helpers.h"

// How a parameter is stepped.
struct RoundedCase {
  StateKind state;
  bool masked, amsgrad, stochastic;
  int percent;         // of a child network's weights; -1: every weight is trained
  bool decay_outside;  // with a child network
  uint64_t offset;     // of its first element in the whole parameter
  int shift;           // elements after which its arrays begin in their memory
};

// The arrays end where their memory ends, so that the sanitizers see an access beyond them.
template <class P>
struct RoundedParameter {
  RoundedCase how;
  int64_t numel, count;  // count: values of each average
  ChildMask mask;
  std::vector<P> param, grad;
  std::vector<uint8_t> state[kAverages], scales[kAverages];

  RoundedParameter(int64_t n, const RoundedCase& c)
      : how(c), numel(n), count(n), mask(n, c.percent < 0 ? 0 : static_cast<uint32_t>(c.percent)) {
    if (how.percent >= 0) count = mask.count();
    param.resize(static_cast<size_t>(n + how.shift));
    grad.resize(param.size());
    for (uint32_t i = 0; i < param.size(); ++i) {
      store(param[i], noise(i, 0));
      store(grad[i], gradient(i));
    }
    const size_t blocks = static_cast<size_t>((n + kCodeBlock - 1) / kCodeBlock);
    for (int a = 0; a < kAverages; ++a) {
      state[a].reserve(1);  // else no address says that the average is there
      state[a].resize(static_cast<size_t>(count + how.shift) * size());
      if (how.state == StateKind::kCodes) scales[a].resize(blocks);
      for (size_t b = 0; b < scales[a].size(); ++b) scales[a][b] = b % 5 == 3 ? 0 : static_cast<uint8_t>(90 + b % 40);
      for (int64_t at = 0; at < count; ++at) fill(a, at);
    }
  }

  size_t size() const { return how.state == StateKind::kCodes ? 1 : how.state == StateKind::kBFloat16 ? 2 : 4; }
  uint8_t* value(int average, int64_t at) {
    return state[average].data() + static_cast<size_t>(at + how.shift) * size();
  }
  bool has(int64_t element) const { return how.percent < 0 || in_child(mask.bits.data(), element); }

  // Blocks of huge and tiny values, of zeros of both signs, of values that are not finite, and of usual ones.
  static float gradient(uint32_t i) {
    const uint32_t kind = i / kMaskBlock % 6;
    const float usual = noise(i, 1);
    if (kind == 1) return i % 3 == 0 ? -0.0f : 0.0f;
    if (kind == 2) return i % kMaskBlock == 77 ? (i % 1024 < 512 ? 3e4f : 3e19f) : usual * 1e-7f;  // 3e19^2 overflows
    if (kind == 3 && i % 41 == 0) return i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
    if (kind == 4) return i % 2 == 0 ? 0.0f : usual * 1e-20f;
    return usual;
  }

  void fill(int average, int64_t at) {
    const auto i = static_cast<uint32_t>(at);
    const uint32_t kind = i / 100 % 5;
    float x = kind == 1 ? 0.0f : noise(i, 2 + static_cast<uint32_t>(average)) * (kind == 2 ? 1e-12f : 1.0f);
    if (average > 0) x *= x;
    uint8_t code = kind == 1 ? 0 : static_cast<uint8_t>(philox4x32_10(i, 9, 0, 0, 1, 1).word[average]);
    BFloat16 half;
    store(half, x);
    memcpy(value(average, at),
           size() == 1   ? static_cast<void*>(&code)
           : size() == 2 ? static_cast<void*>(&half)
                         : &x,
           size());
  }

  StepItem item() {
    StepItem item{};
    item.data[kParam] = param.data() + how.shift;
    item.data[kGrad] = grad.data() + how.shift;
    for (int a = 0; a < kAverages - !how.amsgrad; ++a) {
      item.data[kExpAvg + a] = value(a, 0);
      item.scales[a] = scales[a].data();
    }
    item.numel = numel;
    item.dtype = dtype_of(P{});
    item.masked = how.masked;
    item.keep_threshold = how.masked ? 19661 : kKeepAll;
    item.key = {0x123456789ABCDEFull, 3, 5};
    item.slice = {how.offset, 0, 0};
    if (how.percent >= 0) item.child = mask.packed();
    item.decay_outside = how.decay_outside;
    item.state = how.state;
    item.stochastic = how.stochastic;
    item.constants = step_constants({1e-2, 0.9, 0.999, 1e-8, 0.1, -0.5, share_of(item), false}, 3);
    return item;
  }

  float decoded(int average, int64_t at, int64_t block) {
    const uint8_t* from = value(average, at);
    float x;
    BFloat16 half;
    if (size() == 4) return memcpy(&x, from, 4), x;
    if (size() == 2) return memcpy(&half, from, 2), load(half);
    const float scale = scale_of(scales[average][static_cast<size_t>(block)]);
    return average == 0 ? decode_average(*from, scale) : decode_square(*from, scale);
  }

  void encode(int average, int64_t at, int64_t block, float x, uint32_t random) {
    BFloat16 half;
    store_random(half, x, random);
    if (size() == 4) memcpy(value(average, at), &x, 4);
    if (size() == 2) memcpy(value(average, at), &half, 2);
    if (size() > 1) return;
    const uint32_t scale = scales[average][static_cast<size_t>(block)];
    *value(average, at) = average == 0 ? encode_average(x, inverse_scale_of(scale), random)
                                       : encode_square(x, least_square_of(scale), random);
  }

  // Takes the item's step.
  void step_plainly(const StepItem& item) {
    const auto c = item.constants.cast<float>();
    for (int64_t begin = 0, at = 0; begin < numel; begin += kMaskBlock) {
      const int64_t end = std::min(begin + kMaskBlock, numel), block = begin / kMaskBlock;
      const RoundingWords words =
          rounding_words(item.key, item.slice.offset / kMaskBlock + static_cast<uint64_t>(block));
      std::vector<float> averages[kAverages];
      std::vector<uint32_t> places;
      for (int64_t i = begin; i < end; ++i) {
        P& stored = param[static_cast<size_t>(i + how.shift)];
        if (!has(i)) {
          if (how.decay_outside) store(stored, decayed_outside(c, load(stored)));
          continue;
        }
        const int64_t value = at + static_cast<int64_t>(places.size());
        float weight = load(stored), x[kAverages];
        for (int a = 0; a < kAverages; ++a) x[a] = a < 2 || how.amsgrad ? decoded(a, value, block) : 0.0f;
        const bool keep = !item.masked || keep_element(item.key, item.slice.offset + static_cast<uint64_t>(i), 19661);
        const float g = load(grad[static_cast<size_t>(i + how.shift)]);
        how.amsgrad ? adamw_update<true>(c, keep, g, weight, x[0], x[1], x[2])
                    : adamw_update<false>(c, keep, g, weight, x[0], x[1], x[2]);
        const auto j = static_cast<uint32_t>(i - begin);
        how.stochastic ? store_random(stored, weight, rounding_bits(words.param, j)) : store(stored, weight);
        if (size() == 1) sanitize(x[0], x[1], x[2]);
        for (int a = 0; a < kAverages; ++a) averages[a].push_back(x[a]);
        places.push_back(j);
      }
      store_block(at, block, words, averages, places);
      at += static_cast<int64_t>(places.size());
    }
  }

  void store_block(int64_t at, int64_t block, const RoundingWords& words,
                   const std::vector<float> (&averages)[kAverages], const std::vector<uint32_t>& places) {
    const uint32_t of[kAverages] = {words.exp_avg, words.exp_avg_sq, words.max_exp_avg_sq};
    for (int a = 0; a < kAverages - !how.amsgrad; ++a) {
      uint32_t most = 0;
      for (float x : averages[a]) most = std::max(most, bits_of(x) & 0x7FFFFFFFu);
      if (size() == 1) scales[a][static_cast<size_t>(block)] = static_cast<uint8_t>(scale_byte(most));
      for (size_t k = 0; k < places.size(); ++k) {
        encode(a, at + static_cast<int64_t>(k), block, averages[a][k], rounding_bits(of[a], places[k]));
      }
    }
  }
};

// NaN bits of a float32 differ between processors and compilers; all else must be the same bits.
inline bool same_floats(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
           return bits_of(x) == bits_of(y) || (std::isnan(x) && std::isnan(y));
         });
}

template <class P>
bool same_weights(const std::vector<P>& a, const std::vector<P>& b) {
  if constexpr (sizeof(P) == 4) return same_floats(a, b);
  return same_bytes(a, b);
}

template <class P>
bool same_state(const RoundedParameter<P>& a, const RoundedParameter<P>& b, int average) {
  if (a.how.state != StateKind::kComputed) return same_bytes(a.state[average], b.state[average]);
  std::vector<float> values[2];
  for (int side = 0; side < 2; ++side) {
    const auto& bytes = (side == 0 ? a : b).state[average];
    values[side].resize(bytes.size() / 4);
    if (!bytes.empty()) memcpy(values[side].data(), bytes.data(), bytes.size());
  }
  return same_floats(values[0], values[1]);
}

template <class P>
void expect_same(const RoundedParameter<P>& found, const RoundedParameter<P>& wanted, const char* what) {
  expect(same_weights(found.param, wanted.param), what, found.numel);
  for (int a = 0; a < kAverages; ++a) {
    expect(same_state(found, wanted, a), what, 10 * found.numel + a);
    expect(same_bytes(found.scales[a], wanted.scales[a]), "scales", 10 * found.numel + a);
  }
}
