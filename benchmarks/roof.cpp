// The roof: reads and writes the bytes of one step (reads p, g, m, v; writes p, m, v) and computes next to nothing, on
// the same threads as ours. Plain loops over bytes, whatever the arrays hold, so that none is widened or narrowed: no
// prefetch, no streaming stores. What it takes is what memory asks of such a loop. With a child network m and v are
// shorter, and its mask is read too. The scales of values of one byte are left out, a thousandth of all bytes.
#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define BEST_INSTRUCTION_SET __attribute__((target_clones("avx2", "default")))
#else
#define BEST_INSTRUCTION_SET
#endif

namespace {

constexpr int64_t kBlock = 128;  // weights that are moved together, all arrays in turn

// A run of neighbouring weights of one tensor. With a child network, which has `kept` of them, `mask` is their bits,
// filled up to whole words; else it is null.
struct Piece {
  uint8_t* p;
  const uint8_t* g;
  uint8_t* m;
  uint8_t* v;
  const uint8_t* mask;
  int64_t count;
  int64_t kept;
};

struct Work {
  const Piece* pieces;
  const int64_t* starts;  // slice i is the pieces from starts[i] to starts[i + 1]
  uint8_t zero;           // 0, which the compiler cannot know: every value is read, and written back as it was
  int weight_bytes;       // of a value: 4 with float32 parameters, 2 with bfloat16
  int state_bytes;        // 4 or 1
};

__attribute__((always_inline)) inline void move(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes,
                                                uint8_t zero) {
  for (int64_t i = 0; i < bytes; ++i) to[i] ^= from[i] & zero;
}

__attribute__((always_inline)) inline void move(uint8_t* to, int64_t bytes, uint8_t zero) {
  for (int64_t i = 0; i < bytes; ++i) to[i] ^= zero;
}

BEST_INSTRUCTION_SET void pass(const Piece& piece, const Work& work) {
  for (int64_t at = 0; at < piece.count; at += kBlock) {
    const int64_t count = std::min(kBlock, piece.count - at);
    const int64_t weights = at * work.weight_bytes, states = at * work.state_bytes;
    move(piece.p + weights, piece.g + weights, count * work.weight_bytes, work.zero);
    move(piece.m + states, count * work.state_bytes, work.zero);
    move(piece.v + states, count * work.state_bytes, work.zero);
  }
}

// The same of a child network in float32 parameters.
BEST_INSTRUCTION_SET void pass_child(const Piece& piece, const Work& work) {
  uint8_t nothing = 0;
  for (int64_t i = 0; i < (piece.count + 31) / 32 * 4; ++i) nothing |= piece.mask[i] & work.zero;
  move(piece.p, piece.g, piece.count * work.weight_bytes, work.zero);
  move(piece.m, piece.kept * work.state_bytes, nothing);
  move(piece.v, piece.kept * work.state_bytes, nothing);
}

void run_slice(void* context, int64_t i) {
  const Work& work = *static_cast<const Work*>(context);
  for (int64_t k = work.starts[i]; k < work.starts[i + 1]; ++k) {
    const Piece& piece = work.pieces[k];
    piece.mask != nullptr ? pass_child(piece, work) : pass(piece, work);
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
                     uint8_t zero, int threads) {
  Work work{static_cast<const Piece*>(pieces), starts, zero, weight_bytes, state_bytes};
  childtune::parallel_slices(threads, slices, run_slice, &work);
}
