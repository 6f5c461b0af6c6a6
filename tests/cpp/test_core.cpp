// Unit tests of csrc/core and csrc/cpu, to be run under the address and undefined-behaviour sanitizers: every array is
// a heap block of exactly its size, so that a read or write beside it is caught. Exit status 0 if all holds.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "core/adamw.h"
#include "core/dtypes.h"
#include "core/fisher.h"
#include "core/mask.h"
#include "core/quotient.h"
#include "cpu/driver.h"
#include "test_helpers.h"

// Known answers of Random123, kat_vectors, philox4x32 10.
static void test_philox() {
  const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1},
  };
  for (const auto& c : cases) {
    const Philox4 out = philox4x32_10(c[0], c[1], c[2], c[3], c[4], c[5]);
    for (int i = 0; i < 4; ++i) expect(out.word[i] == c[6 + i], "Philox known answer", i);
  }
}

static void test_half_precision() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    Float16 h{static_cast<uint16_t>(bits)}, back;
    store(back, load(h));
    const bool nan = (bits & 0x7FFF) > 0x7C00;
    expect(nan ? std::isnan(load(h)) && back.bits == 0x7E00 : back.bits == bits, "fp16 round trip", bits);
    BFloat16 b{static_cast<uint16_t>(bits)}, again;
    store(again, load(b));
    const bool bnan = (bits & 0x7FFF) > 0x7F80;
    expect(bnan ? std::isnan(load(b)) && again.bits == 0x7FC0 : again.bits == bits, "bf16 round trip", bits);
  }
  // Between two neighbours, a number rounds down below the middle, to even at it, and up above it.
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const float low = load(Float16{static_cast<uint16_t>(bits)}), high = load(Float16{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    Float16 h;
    store(h, middle);
    expect(h.bits == bits + (bits & 1), "fp16 tie to even", bits);
    store(h, std::nextafter(middle, 0.0f));
    expect(h.bits == bits, "fp16 below the middle", bits);
    store(h, std::nextafter(middle, 1e9f));
    expect(h.bits == bits + 1, "fp16 above the middle", bits);
  }
  Float16 h;
  store(h, 65520.0f);
  expect(h.bits == 0x7C00, "fp16 overflow");
}

template <class P>
static void plain_step(const StepItem& it, Arrays<P>* a) {
  using T = typename ComputeType<P>::type;
  const auto c = it.constants.cast<T>();
  const int64_t run = it.slice.run == 0 ? it.numel : it.slice.run;
  for (int64_t i = 0; i < it.numel; ++i) {
    const uint64_t element = it.slice.offset + i / run * it.slice.stride + i % run;
    const bool keep = !it.masked || keep_element(it.key, element, it.keep_threshold);
    const size_t at = static_cast<size_t>(i * a->stride);
    T param = load(a->param[at]);
    if (it.data[kMaxExpAvgSq]) {
      adamw_update<true>(c, keep, T(load(a->grad[at])), param, a->state[0][at], a->state[1][at], a->state[2][at]);
    } else {
      adamw_update<false>(c, keep, T(load(a->grad[at])), param, a->state[0][at], a->state[1][at], a->state[2][at]);
    }
    store(a->param[at], param);
  }
}

// The vectorised step, cut over threads, equals a plain loop over core's scalar functions.
template <class P>
static void test_step(bool masked, bool amsgrad, int64_t stride, MaskSlice slice, int threads) {
  for (int64_t n : {0, 1, 3, 127, 128, 129, 4097, 300001}) {
    if (slice.run != 0 && n % slice.run != 0) continue;
    Arrays<P> fast(n, stride), plain(n, stride);
    plain_step(plain.item(masked, amsgrad, slice), &plain);
    step_cpu({fast.item(masked, amsgrad, slice)}, threads);
    expect(same_bytes(fast.param, plain.param), "param equals the plain loop's", n);
    for (int k = 0; k < 3; ++k) expect(same_bytes(fast.state[k], plain.state[k]), "state equals the plain loop's", n);
  }
}

template <class P>
static void test_steps() {
  const MaskSlice slices[] = {{}, {1000003, 0, 0}, {(1ull << 35) - 64, 0, 0}, {77, 43, 1000}};
  for (bool masked : {false, true}) {
    for (bool amsgrad : {false, true}) {
      for (int64_t stride : {1, 3}) {
        for (const MaskSlice& slice : slices) test_step<P>(masked, amsgrad, stride, slice, 2);
      }
    }
  }
}

// Every 16-bit weight, infinities and NaNs among them, is converted and rounded as by core's scalar functions,
// whichever number the decay makes of it: by a step of all weights, and by that of a child network.
template <class P>
static void test_every_half() {
  for (double decay : {1.0, 0.99999, 1.0 / 3, 0x1p-14, 1.001}) {
    for (bool masked : {false, true}) {
      Arrays<P> fast(65536, 1), plain(65536, 1), child(65536, 1);
      ChildMask all(65536, 100);
      for (size_t i = 0; i < 65536; ++i) fast.param[i].bits = plain.param[i].bits = static_cast<uint16_t>(i);
      child.param = fast.param;
      StepItem item = plain.item(masked, false, {}), step = fast.item(masked, false, {});
      StepItem of_child = child.item(false, false, {});
      of_child.child = all.packed();
      item.constants.decay_before = step.constants.decay_before = of_child.constants.decay_before = decay;
      plain_step(item, &plain);
      step_cpu({step}, 1);
      step_cpu({of_child}, 1);
      expect(same_bytes(fast.param, plain.param), "every 16-bit weight", masked);
      if (!masked) expect(same_bytes(child.param, plain.param), "every 16-bit weight of a child network");
    }
  }
}

// Elements beyond 2^31, in arrays of which only the touched pages exist.
static void test_large_index() {
  const int64_t n = (1ll << 31) + 5000, begin = (1ll << 31) - 3000, end = (1ll << 31) + 3000;
  StepItem item = Arrays<float>(1, 1).item(true, true, {});
  item.numel = n;
  for (void*& data : item.data) {
    data = mmap(nullptr, static_cast<size_t>(n) * 4, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return std::printf("large index: not tested, no address space\n"), void();
  }
  float* grad = static_cast<float*>(item.data[kGrad]);
  for (int64_t i = begin; i < end; ++i) grad[i] = 1.0f;
  baseline::kernels().step(item, begin, end);
  const float* exp_avg = static_cast<float*>(item.data[kExpAvg]);
  for (int64_t i = begin - 200; i < end + 200; ++i) {
    const bool keep = i >= begin && i < end && keep_element(item.key, static_cast<uint64_t>(i), item.keep_threshold);
    expect((exp_avg[i] != 0) == keep, "large index", i);
  }
  for (void* data : item.data) munmap(data, static_cast<size_t>(n) * 4);
}

// The sum does not depend on the threads or on strides, is close to the exact one, and is NaN if an element is.
static void test_sum_of_squares() {
  for (int64_t n : {0, 1, 1023, 1024, 1025, 70001}) {
    Arrays<float> a(n, 1), strided(n, 3);
    double exact = 0;
    for (float g : a.grad) exact += static_cast<double>(g) * g;
    const StepItem item = a.item(false, false, {});
    const double one = sums_of_squares_cpu({item}, 1)[0], two = sums_of_squares_cpu({item}, 2)[0];
    expect(one == two, "sum_of_squares does not depend on threads", n);
    // Sums of n positive terms, each partial sum rounded to 2^-53 of itself at most n times.
    expect(std::fabs(one - exact) <= static_cast<double>(n) * 0x1p-52 * exact, "sum_of_squares", n);
    if (n > 0) {
      a.grad.back() = std::numeric_limits<float>::quiet_NaN();
      expect(std::isnan(sums_of_squares_cpu({a.item(false, false, {})}, 2)[0]), "a NaN gets through", n);
    }
    for (int64_t i = 0; i < n; ++i) strided.grad[static_cast<size_t>(3 * i)] = noise(static_cast<uint32_t>(i), 1);
    expect(sums_of_squares_cpu({strided.item(false, false, {})}, 2)[0] == one, "sum_of_squares of a strided array", n);
  }
}

// Scores equal a plain loop's, whatever the gradient's stride, and an infinite element is noticed wherever it is.
template <class P>
static void test_accumulate_squares() {
  using T = typename ComputeType<P>::type;
  for (int64_t stride : {1, 3}) {
    for (int64_t n : {0, 1, 3, 127, 128, 129, 4097, 300001}) {
      Arrays<P> a(n, stride);
      std::vector<float> score(static_cast<size_t>(n), 0.5f), plain = score;
      for (int64_t i = 0; i < n; ++i)
        add_square(T(0.25), T(-3), T(load(a.grad[static_cast<size_t>(i * stride)])), plain[static_cast<size_t>(i)]);
      SquaresItem item = a.squares_item(score.data());
      expect(accumulate_squares_cpu(item, 0.25, -3.0, 2), "finite gradients", n);
      expect(same_bytes(score, plain), "scores equal the plain loop's", n);
      for (int64_t at : {n / 2, n - 1}) {
        if (n == 0) continue;
        Arrays<P> bad(n, stride);
        store(bad.grad[static_cast<size_t>(at * stride)], -std::numeric_limits<T>::infinity());
        item.grad = bad.grad.data();
        expect(!accumulate_squares_cpu(item, 0.25, -3.0, 2), "an infinite gradient is noticed", n);
      }
    }
  }
}

static void test_integer_power() {
  expect(integer_power(0.9, 0) == 1.0 && integer_power(0.9, 1) == 0.9, "first powers");
  for (uint64_t t : {2, 10, 1000, 100000}) {
    const double exact = std::pow(0.999, static_cast<double>(t));
    // Squaring doubles the relative error so far and adds a rounding: at most 2 t roundings of 2^-53 in all.
    expect(std::fabs(integer_power(0.999, t) - exact) <= static_cast<double>(t) * 0x1p-51 * exact, "integer_power", t);
  }
}

void test_child_steps();
void test_rounded_steps();
void test_codes();
void test_known_answers();
void test_selection();
void test_registers();
void test_cuda_plan();
void test_cuda_steps();
void test_cuda_counted_steps();
void test_cuda_child_steps();
void test_cuda_rounded_steps();
void test_cuda_scores();

static int64_t wrong_quotients(float divisor, uint32_t first, uint32_t end, uint32_t step) {
  const float inverse = 1.0f / divisor;
  int64_t wrong = 0;
  for (uint32_t root = first; root < end; root += step) {
    const float x = bit_cast<float>(root);
    wrong += bits_of(quotient_by_inverse(x, divisor, inverse)) != bits_of(x / divisor);
  }
  return wrong;
}

// The quotient by an inverse is the quotient: of every root in an octave for the hardest divisor and for one of a step,
// of many for others, also where roots are as small and as large as they can be.
static void test_quotient_by_inverse() {
  constexpr uint32_t kLeast = 52u << 23, kOne = 127u << 23, kMost = 190u << 23, kOctave = 1u << 23;
  const char* what = "quotients by an inverse are quotients";
  const auto of_step = [](uint64_t step) { return static_cast<float>(std::sqrt(1.0 - integer_power(0.999, step))); };
  for (float divisor : {0x1.fffffep-1f, of_step(3)}) {
    expect(wrong_quotients(divisor, kOne, kOne + kOctave, 1) == 0, what);
  }
  for (float divisor : {1.0f, 0x1.000002p-1f, 0x1p-27f, of_step(1), of_step(100), of_step(5000)}) {
    for (uint32_t first : {kLeast, kOne, kMost}) {
      expect(wrong_quotients(divisor, first, first + kOctave, 61) == 0, what, first);
    }
    const float inverse = 1.0f / divisor;
    for (float root : {0.0f, -0.0f, INFINITY}) {
      expect(bits_of(quotient_by_inverse(root, divisor, inverse)) == bits_of(root / divisor), what);
    }
    expect(std::isnan(quotient_by_inverse(NAN, divisor, inverse)), "NaN by an inverse");
  }
  for (uint32_t below = 1; below <= 64; ++below) {  // where the product may be more than an ulp from the quotient
    const float divisor = bit_cast<float>(kOne - below);
    expect(wrong_quotients(divisor, kOne - 4096, kOne + 4096, 1) == 0, what, below);
  }
}

int main() {
  test_philox();
  test_half_precision();
  test_codes();
  test_integer_power();
  test_quotient_by_inverse();
  test_large_index();
  test_cuda_plan();
  test_cuda_steps();
  test_cuda_counted_steps();
  test_cuda_child_steps();
  test_cuda_rounded_steps();
  test_cuda_scores();
  for (const std::string& name : supported_instruction_sets()) {
    expect(set_instruction_set(name), "set_instruction_set");
    test_steps<float>();
    test_steps<double>();
    test_steps<BFloat16>();
    test_every_half<BFloat16>();
    test_every_half<Float16>();
    test_known_answers();
    test_child_steps();
    test_rounded_steps();
    test_selection();
    test_registers();
    test_sum_of_squares();
    test_accumulate_squares<float>();
    test_accumulate_squares<double>();
    test_accumulate_squares<BFloat16>();
    std::printf("%s: done\n", name.c_str());
  }
  expect(!set_instruction_set("none"), "an unknown instruction set is refused");
  std::printf(failures == 0 ? "all passed\n" : "%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
