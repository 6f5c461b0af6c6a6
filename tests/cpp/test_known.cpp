// Known answers of the step, which every processor must give: of F, of all weights and of D, for each dtype. They are
// those of the pure-torch backend; tests/ops/test_known_answers.py computes them anew. Called by test_core.cpp's main.
#include <cmath>
#include <cstdlib>

#include "cpu/driver.h"
#include "known_answers.h"
#include "test_helpers.h"

static uint32_t hashed(uint32_t i, uint32_t stream) {
  uint32_t x = i * 0x9E3779B1u + stream * 0x85EBCA77u;
  x = (x ^ x >> 15) * 0x2C1B3C6Du;
  x = (x ^ x >> 12) * 0x297A2D39u;
  return x ^ x >> 15;
}

static void set_bits(float& to, uint64_t bits) { to = bit_cast<float>(static_cast<uint32_t>(bits)); }
static void set_bits(double& to, uint64_t bits) { to = bit_cast<double>(bits); }
static void set_bits(BFloat16& to, uint64_t bits) { to.bits = static_cast<uint16_t>(bits); }
static void set_bits(Float16& to, uint64_t bits) { to.bits = static_cast<uint16_t>(bits); }

// All NaNs of float and double are one: processors differ in them.
static uint64_t digested(float x) { return std::isnan(x) ? ~0ull : bits_of(x); }
static uint64_t digested(double x) { return std::isnan(x) ? ~0ull : bits_of(x); }
static uint64_t digested(BFloat16 x) { return x.bits; }
static uint64_t digested(Float16 x) { return x.bits; }

template <class V>
static void digest(const std::vector<V>& values, uint64_t* so_far) {
  for (const V& value : values) *so_far = (*so_far ^ digested(value)) * 0x100000001B3ull;
}

// Every second number is between -1 and 1; the others are any bits at all: NaNs, infinities and subnormals too.
template <class P>
static void fill(std::vector<P>* values, uint32_t stream) {
  for (uint32_t i = 0; i < values->size(); ++i) {
    const uint64_t bits = uint64_t{hashed(i, stream)} << 32 | hashed(i, stream + 8);
    set_bits((*values)[i], bits);
    if (i % 2 == 0) store((*values)[i], typename ComputeType<P>::type(static_cast<int32_t>(bits >> 32)) * 0x1p-31f);
  }
}

template <class P>
static void test_known(const char* mode, uint64_t answer) {
  using T = typename ComputeType<P>::type;
  Arrays<P> a(kKnownWeights, 1);
  fill(&a.param, 0);
  fill(&a.grad, 1);
  for (uint32_t i = 0; i < kKnownWeights; ++i) {
    for (uint32_t k = 0; k < 2; ++k) a.state[k][i] = std::fabs(T(static_cast<int32_t>(hashed(i, 2 + k))) * 0x1p-31f);
  }
  ChildMask mask(kKnownWeights, 30);
  if (*mode == 'D') a.keep_child(mask.count());
  StepItem item = a.item(*mode == 'F', false, {});
  if (*mode == 'D') item.child = mask.packed();
  step_cpu({item}, 2);
  uint64_t found = 0xCBF29CE484222325ull;
  digest(a.param, &found);
  digest(a.state[0], &found);
  digest(a.state[1], &found);
  expect(found == answer, "known answer", static_cast<long long>(found));
}

void test_known_answers() {
  for (const KnownAnswer& known : kKnownAnswers) {
    test_known<float>(known.mode, known.float32);
    test_known<double>(known.mode, known.float64);
    test_known<BFloat16>(known.mode, known.bfloat16);
    test_known<Float16>(known.mode, known.float16);
  }
}
