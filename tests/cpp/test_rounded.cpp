// Unit tests of the CPU's step that rounds stochastically: it equals a plain loop over the functions of core/. Called
// by test_core.cpp's main.
#include "cpu/driver.h"
#include "rounded_parameter.h"

namespace {

template <class P>
void test_rounded(const RoundedCase& how) {
  for (int64_t n : {1, 127, 129, 1024, 3000}) {
    RoundedParameter<P> plain(n, how), fast(n, how);
    for (uint32_t step = 0; step < 2; ++step) {
      StepItem items[2] = {plain.item(), fast.item()};
      for (StepItem& item : items) item.key.step += step;
      plain.step_plainly(items[0]);
      step_cpu({items[1]}, 2);
      expect_same(fast, plain, "a step that rounds equals the plain loop");
    }
  }
}

template <class P>
void test_rounded_typed() {
  for (StateKind state : {StateKind::kCodes, StateKind::kBFloat16, StateKind::kComputed}) {
    for (bool amsgrad : {false, true}) {
      for (bool stochastic : {false, true}) {
        const uint64_t offset = amsgrad ? (uint64_t{1} << 39) - 256 : 0;
        for (bool masked : {false, true}) {
          test_rounded<P>({state, masked, amsgrad, stochastic, -1, false, offset, stochastic});
        }
        for (int percent : {0, 1, 30, 100}) {
          test_rounded<P>({state, false, amsgrad, stochastic, percent, stochastic, offset, amsgrad});
        }
      }
    }
  }
}

// No mask makes a step read or write beyond its arrays: the sanitizers watch.
void test_damaged_masks() {
  for (int64_t n : {1, 100, 1024, 5000}) {
    RoundedParameter<float> child(n, {StateKind::kCodes, false, true, false, 30, true, 0, 0});
    StepItem item = child.item();
    item.child.count /= 2;
    step_cpu({item}, 1);
    for (int64_t wrong : {INT64_MAX, INT64_MIN, int64_t{-1}, child.count + 1}) {
      const std::vector<int64_t> offsets(child.mask.offsets.size(), wrong);
      item.child = {child.mask.bits.data(), offsets.data(), child.count};
      step_cpu({item}, 1);
    }
    std::fill(child.mask.bits.begin(), child.mask.bits.end(), uint8_t{0xFF});
    item.child = child.mask.packed();
    step_cpu({item}, 1);
  }
}

}  // namespace

void test_rounded_steps() {
  test_rounded_typed<float>();
  test_rounded_typed<BFloat16>();
  test_rounded_typed<Float16>();
  test_damaged_masks();
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
