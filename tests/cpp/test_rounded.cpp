// Unit tests of the step that rounds stochastically: it equals a plain loop over the functions of core/. Called by
// test_core.cpp's main.
#include <cmath>
#include <limits>
#include <vector>

#include "core/adamw.h"
#include "core/codes.h"
#include "core/rounding.h"
#include "cpu/driver.h"
#include "test_helpers.h"

// The state of a parameter with nothing beside it, so that the sanitizers see an access beyond it.
template <class Stored>
struct RoundedState {
  std::vector<Stored> values[kAverages];
  std::vector<uint8_t> scales[kAverages];

  RoundedState(int64_t count, int64_t numel) {
    for (int k = 0; k < kAverages; ++k) {
      values[k].resize(static_cast<size_t>(count));
      scales[k].resize(static_cast<size_t>((numel + kCodeBlock - 1) / kCodeBlock));
    }
  }

  void enter(StepItem* item, StateKind kind) {
    item->state = kind;
    for (int k = 0; k < kAverages; ++k) {
      if (item->data[kExpAvg + k] == nullptr) continue;
      item->data[kExpAvg + k] = values[k].data();
      item->scales[k] = kind == StateKind::kCodes ? scales[k].data() : nullptr;
    }
  }
};

static float read(uint8_t code, int k, float scale) {
  return k == 0 ? decode_average(code, scale) : decode_square(code, scale);
}
static float read(BFloat16 x, int, float) { return load(x); }
static float read(float x, int, float) { return x; }

static void write(uint8_t& code, float x, int k, uint32_t scale, uint32_t random) {
  code = k == 0 ? encode_average(x, inverse_scale_of(scale), random) : encode_square(x, least_square_of(scale), random);
}
static void write(BFloat16& to, float x, int, uint32_t, uint32_t random) { store_random(to, x, random); }
static void write(float& to, float x, int, uint32_t, uint32_t) { to = x; }

// Steps a parameter by the functions of core/, block by block.
template <class P, class Stored>
static void plain_step(const StepItem& item, bool amsgrad, int64_t stride, Arrays<P>* arrays, RoundedState<Stored>* s) {
  const auto c = item.constants.cast<float>();
  const int averages = amsgrad ? 3 : 2;
  int64_t at = 0;
  for (int64_t begin = 0; begin < item.numel; begin += kCodeBlock) {
    const size_t local = static_cast<size_t>(begin / kCodeBlock);
    const uint64_t block = (item.slice.offset + static_cast<uint64_t>(begin)) / kCodeBlock;
    const RoundingWords drawn = rounding_words(item.key, block);
    const uint32_t words[kAverages] = {drawn.exp_avg, drawn.exp_avg_sq, drawn.max_exp_avg_sq};
    struct Value {
      uint32_t place;
      float of[kAverages];
    };
    std::vector<Value> updated;
    uint32_t most[kAverages] = {};
    for (int64_t i = begin; i < begin + kCodeBlock && i < item.numel; ++i) {
      P& stored = arrays->param[static_cast<size_t>(i * stride)];
      float param = load(stored);
      if (item.child.bits != nullptr && !in_child(item.child.bits, i)) {
        if (item.decay_outside) store(stored, decayed_outside(c, param));
        continue;
      }
      Value v{static_cast<uint32_t>(i - begin), {}};
      const size_t slot = static_cast<size_t>(at) + updated.size();
      for (int k = 0; k < averages; ++k) v.of[k] = read(s->values[k][slot], k, scale_of(s->scales[k][local]));
      const uint64_t element = item.slice.offset + static_cast<uint64_t>(i);
      const bool keep = !item.masked || keep_element(item.key, element, item.keep_threshold);
      const float grad = load(arrays->grad[static_cast<size_t>(i * stride)]);
      amsgrad ? adamw_update<true>(c, keep, grad, param, v.of[0], v.of[1], v.of[2])
              : adamw_update<false>(c, keep, grad, param, v.of[0], v.of[1], v.of[2]);
      item.stochastic ? store_random(stored, param, rounding_bits(drawn.param, v.place)) : store(stored, param);
      if (item.state == StateKind::kCodes) sanitize(v.of[0], v.of[1], v.of[2]);
      for (int k = 0; k < averages; ++k) {
        const uint32_t bits = bits_of(v.of[k]) & 0x7FFFFFFFu;
        most[k] = most[k] < bits ? bits : most[k];
      }
      updated.push_back(v);
    }
    for (int k = 0; k < averages; ++k) {
      if (item.state == StateKind::kCodes) s->scales[k][local] = static_cast<uint8_t>(scale_byte(most[k]));
    }
    for (const Value& v : updated) {
      for (int k = 0; k < averages; ++k) {
        write(s->values[k][static_cast<size_t>(at)], v.of[k], k, s->scales[k][local], rounding_bits(words[k], v.place));
      }
      ++at;
    }
  }
}

enum class Trained { kAll, kMasked, kChild };

template <class P, class Stored>
static void test_rounded(StateKind kind, Trained trained, bool amsgrad, bool stochastic, int64_t stride) {
  for (int64_t n : {1, 127, 129, 1024, 3000}) {
    ChildMask mask(n, 30);
    const bool child = trained == Trained::kChild;
    Arrays<P> fast(n, stride), plain(n, stride);
    RoundedState<Stored> fast_state(child ? mask.count() : n, n), plain_state(child ? mask.count() : n, n);
    StepItem item = fast.item(trained == Trained::kMasked, amsgrad, {});
    item.slice.offset = 128 * 17;
    item.stochastic = stochastic;
    item.decay_outside = stride > 1;
    if (child) item.child = mask.packed();
    fast_state.enter(&item, kind);
    for (uint32_t step = 1; step <= 3; ++step) {
      item.key.step = step;
      for (size_t i = 0; i < fast.grad.size(); ++i) {  // of many sizes; in the second step also what no code can hold
        float grad = std::ldexp(noise(static_cast<uint32_t>(i), step), -static_cast<int>(i % 40));
        if (step == 2 && i % 300 == 7) grad = std::numeric_limits<float>::infinity();
        if (step == 2 && i % 300 == 299) grad = std::numeric_limits<float>::quiet_NaN();
        if (step == 2 && i % 1000 == 650) grad = 3e19f;
        store(fast.grad[i], grad);
        plain.grad[i] = fast.grad[i];
      }
      step_cpu({item}, 2);
      plain_step(item, amsgrad, stride, &plain, &plain_state);
      // A NaN of float is the processor's, whatever its bits are; the others have bits of their own.
      for (size_t i = 0; i < fast.param.size(); ++i) {
        const float a = load(fast.param[i]), b = load(plain.param[i]);
        if (a != a && b != b && sizeof(P) == 4) fast.param[i] = plain.param[i];
      }
      expect(same_bytes(fast.param, plain.param), "rounded step: param equals the plain loop's", n);
      for (int k = 0; k < kAverages; ++k) {
        if (kind != StateKind::kComputed)
          expect(same_bytes(fast_state.values[k], plain_state.values[k]), "rounded step: state", n);
        expect(same_bytes(fast_state.scales[k], plain_state.scales[k]), "rounded step: scales", n);
      }
    }
  }
}

template <class P>
static void test_rounded_typed() {
  for (Trained trained : {Trained::kAll, Trained::kMasked, Trained::kChild}) {
    for (bool amsgrad : {false, true}) {
      test_rounded<P, uint8_t>(StateKind::kCodes, trained, amsgrad, false, 1);
      test_rounded<P, BFloat16>(StateKind::kBFloat16, trained, amsgrad, amsgrad, 1);
      if (sizeof(P) == 2) test_rounded<P, float>(StateKind::kComputed, trained, amsgrad, true, 1);
    }
    test_rounded<P, uint8_t>(StateKind::kCodes, trained, false, true, 1);
  }
  test_rounded<P, uint8_t>(StateKind::kCodes, Trained::kChild, false, true, 3);
}

void test_rounded_steps() {
  test_rounded_typed<float>();
  test_rounded_typed<BFloat16>();
  test_rounded_typed<Float16>();
}

// Every code means a number that has no other code but that of -0, whatever is drawn; and the largest number of a block
// never needs more than its scale.
void test_codes() {
  for (uint32_t scale : {kLeastScale, 127u, kMostScale}) {
    const float factor = scale_of(scale);
    for (int code = 0; code < 256; ++code) {
      const auto byte = static_cast<uint8_t>(code);
      for (uint32_t random : {0u, kNearest, ~0u}) {
        const float average = decode_average(byte, factor), square = decode_square(byte, factor);
        expect(encode_average(average, inverse_scale_of(scale), random) == (byte == 0x80 ? 0 : byte), "average", code);
        expect(encode_square(square, least_square_of(scale), random) == byte, "square", code);
      }
    }
  }
  expect(scale_byte(0) == 0 && scale_byte(1) == kLeastScale && scale_byte(kMostBits) == kMostScale, "scales' limits");
  for (uint32_t i = 0; i < 200000; ++i) {
    const uint32_t most = kMostBits - i * (kMostBits / 200000);
    const uint32_t scale = scale_byte(most);
    const float value = bit_cast<float>(most);
    const float factor = scale_of(scale);
    const float average = decode_average(encode_average(value, inverse_scale_of(scale), ~0u), factor);
    const float square = decode_square(encode_square(value, least_square_of(scale), ~0u), factor);
    if (scale == kLeastScale) continue;
    expect(average >= value && average < 1.15f * value, "the largest average has a code", most);
    expect(square >= value && square < 1.15f * value, "the largest square has a code", most);
  }
}
