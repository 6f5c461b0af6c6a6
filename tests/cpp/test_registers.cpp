// Unit test of what the kernels leave behind in the processor's registers. Called by test_core.cpp's main.
#include "cpu/driver.h"
#include "test_helpers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

static bool upper_halves_in_use() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low >> 2 & 1;
}

// Returns whether the processor has AVX and tells which of its registers are in use.
static bool tells_registers_in_use() {
  uint32_t a, b, c, d;
  if (!__builtin_cpu_supports("avx") || !__get_cpuid_count(0xD, 1, &a, &b, &c, &d) || !(a >> 2 & 1)) return false;
  __asm__ volatile("vzeroupper");
  return !upper_halves_in_use();
}

template <class P>
static void test_registers_after_steps() {
  for (int64_t n : {1, 33, 128, 1030}) {
    ChildMask mask(n, 30);
    for (bool child : {false, true}) {
      Arrays<P> arrays(n, 1);
      if (child) arrays.keep_child(mask.count());
      for (bool masked : {false, !child}) {
        StepItem item = arrays.item(masked, false, {});
        if (child) item.child = mask.packed();
        current_kernels().step(item, 0, n);
        expect(!upper_halves_in_use(), "a step leaves upper halves of registers in use", n);
        current_kernels().sum_of_squares(item, 0, n < kNormChunk ? n : kNormChunk);
        expect(!upper_halves_in_use(), "a sum of squares leaves upper halves of registers in use", n);
      }
    }
  }
}

// Code of 128 bits is slow while the upper halves of wider registers are in use.
void test_registers() {
  if (!tells_registers_in_use()) return;
  test_registers_after_steps<float>();
  test_registers_after_steps<double>();
  test_registers_after_steps<BFloat16>();
}

#else

void test_registers() {}

#endif
