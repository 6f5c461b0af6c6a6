// The roof: reads and writes the bytes of one step (reads p, g, m, v; writes p, m, v) and computes next to nothing, on
// the same threads as ours. Plain loops: no prefetch, no streaming stores. What it takes is what memory asks of such a
// loop. With a child network m and v are shorter, and its mask is read too. m and v take four bytes a value, or one;
// the scales of values of one byte are left out, a thousandth of all bytes.
#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define BEST_INSTRUCTION_SET __attribute__((target_clones("avx2", "default")))
#else
#define BEST_INSTRUCTION_SET
#endif

namespace {

// A run of neighbouring weights of one tensor; `weight_bytes` is 4 with float32 parameters, 2 with bfloat16, and
// `state_bytes` 4 or 1. With a
// child network, which has `kept` of them, `mask` is their bits, filled up to whole words; else it is null.
struct Piece {
  void* p;
  const void* g;
  void* m;
  void* v;
  const uint32_t* mask;
  int64_t count;
  int64_t kept;
};

// `zero` is 0, which the compiler cannot know: every value is read, and written back as it was.
template <class Weight, class State>
__attribute__((always_inline)) inline void pass(const Piece& piece, uint32_t zero) {
  Weight* __restrict p = static_cast<Weight*>(piece.p);
  const Weight* __restrict g = static_cast<const Weight*>(piece.g);
  State* __restrict m = static_cast<State*>(piece.m);
  State* __restrict v = static_cast<State*>(piece.v);
  for (int64_t i = 0; i < piece.count; ++i) {
    const uint32_t nothing = g[i] & zero;
    p[i] = static_cast<Weight>(p[i] ^ nothing);
    m[i] = static_cast<State>(m[i] ^ nothing);
    v[i] = static_cast<State>(v[i] ^ nothing);
  }
}

// The same of a child network in float32 parameters.
template <class State>
__attribute__((always_inline)) inline void pass_child(const Piece& piece, uint32_t zero) {
  uint32_t* __restrict p = static_cast<uint32_t*>(piece.p);
  const uint32_t* __restrict g = static_cast<const uint32_t*>(piece.g);
  State* __restrict m = static_cast<State*>(piece.m);
  State* __restrict v = static_cast<State*>(piece.v);
  uint32_t nothing = 0;
  for (int64_t i = 0; i < (piece.count + 31) / 32; ++i) nothing |= piece.mask[i] & zero;
  for (int64_t i = 0; i < piece.count; ++i) p[i] ^= (g[i] & zero) | nothing;
  for (int64_t i = 0; i < piece.kept; ++i) {
    m[i] = static_cast<State>(m[i] ^ nothing);
    v[i] = static_cast<State>(v[i] ^ nothing);
  }
}

BEST_INSTRUCTION_SET void pass_32(const Piece& piece, uint32_t zero) { pass<uint32_t, uint32_t>(piece, zero); }
BEST_INSTRUCTION_SET void pass_16(const Piece& piece, uint32_t zero) { pass<uint16_t, uint32_t>(piece, zero); }
BEST_INSTRUCTION_SET void pass_32_8(const Piece& piece, uint32_t zero) { pass<uint32_t, uint8_t>(piece, zero); }
BEST_INSTRUCTION_SET void pass_16_8(const Piece& piece, uint32_t zero) { pass<uint16_t, uint8_t>(piece, zero); }
BEST_INSTRUCTION_SET void pass_child_32(const Piece& piece, uint32_t zero) { pass_child<uint32_t>(piece, zero); }
BEST_INSTRUCTION_SET void pass_child_8(const Piece& piece, uint32_t zero) { pass_child<uint8_t>(piece, zero); }

struct Work {
  const Piece* pieces;
  const int64_t* starts;  // slice i is the pieces from starts[i] to starts[i + 1]
  uint32_t zero;
  int weight_bytes;
  int state_bytes;
};

using Pass = void (*)(const Piece&, uint32_t);

Pass pass_of(const Work& work, bool child) {
  const bool coded = work.state_bytes == 1;
  if (child) return coded ? pass_child_8 : pass_child_32;
  if (work.weight_bytes == 4) return coded ? pass_32_8 : pass_32;
  return coded ? pass_16_8 : pass_16;
}

void run_slice(void* context, int64_t i) {
  const Work& work = *static_cast<const Work*>(context);
  for (int64_t k = work.starts[i]; k < work.starts[i + 1]; ++k) {
    const Piece& piece = work.pieces[k];
    pass_of(work, piece.mask != nullptr)(piece, work.zero);
  }
}

constexpr int64_t kSliceWords = 1 << 18;

// Memory that is only read, or only written with `value`.
struct Stream {
  uint32_t* words;
  int64_t count;
  uint32_t value;
};

BEST_INSTRUCTION_SET uint32_t read_words(const uint32_t* words, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= words[i];
  return bits;
}

BEST_INSTRUCTION_SET void write_words(uint32_t* words, int64_t count, uint32_t value) {
  for (int64_t i = 0; i < count; ++i) words[i] = value;
}

int64_t slice_words(const Stream& stream, int64_t i) { return std::min(kSliceWords, stream.count - i * kSliceWords); }

void read_slice(void* context, int64_t i) {
  const Stream& stream = *static_cast<const Stream*>(context);
  uint32_t* begin = stream.words + i * kSliceWords;
  const uint32_t bits = read_words(begin, slice_words(stream, i));
  if (bits == stream.value) begin[0] = bits;  // what is read is used, or the compiler would leave the loop out
}

void write_slice(void* context, int64_t i) {
  const Stream& stream = *static_cast<const Stream*>(context);
  write_words(stream.words + i * kSliceWords, slice_words(stream, i), stream.value);
}

}  // namespace

// Reads `count` words, or writes `value` to them.
extern "C" void stream(uint32_t* words, int64_t count, int write, uint32_t value, int threads) {
  Stream stream{words, count, value};
  childtune::parallel_slices(threads, (count + kSliceWords - 1) / kSliceWords, write ? write_slice : read_slice,
                             &stream);
}

extern "C" void roof(const void* pieces, const int64_t* starts, int64_t slices, int weight_bytes, int state_bytes,
                     uint32_t zero, int threads) {
  Work work{static_cast<const Piece*>(pieces), starts, zero, weight_bytes, state_bytes};
  childtune::parallel_slices(threads, slices, run_slice, &work);
}
