/* What GCC's -fsanitize-coverage=trace-pc calls, told to libFuzzer in the form that it knows: a counter for each block of
   code, found by a hash of its address. libFuzzer has a function of the same name, which refuses: link this with
   -Bsymbolic-functions. */
#include <stdint.h>

void __sanitizer_cov_8bit_counters_init(uint8_t *begin, uint8_t *end);

static uint8_t counters[1 << 14];

__attribute__((constructor)) static void tell(void) {
  __sanitizer_cov_8bit_counters_init(counters, counters + sizeof counters);
}

void __sanitizer_cov_trace_pc(void) {
  ++counters[((uint64_t)(uintptr_t)__builtin_return_address(0) * 0x9E3779B97F4A7C15ull) >> 50];
}

/* Comparisons of numbers with a fraction, which libFuzzer does not follow. */
void __sanitizer_cov_trace_cmpf(float a, float b) { (void)a, (void)b; }
void __sanitizer_cov_trace_cmpd(double a, double b) { (void)a, (void)b; }
