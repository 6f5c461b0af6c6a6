// The compact step of a child network over a range of one parameter.
//
// Work goes in packed blocks of 1024 weights: the child network's weights and gradients are compressed into buffers
// that stay in the first-level cache, updated there as one dense array together with their compact state, and expanded
// back.
#pragma once

#include "core/adamw.h"
#include "core/step_item.h"
#include "cpu/child_lanes.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/layout.h"
#include "cpu/loops.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

// Updates `count` weights, all of them.
template <bool kAmsgrad, class P, class T>
CHILDTUNE_OUT_OF_LINE void update_dense(const AdamWConstants<T>& constants, const Streams<P>& streams, int64_t count) {
  const AdamWConstants<T> c = constants;  // a local copy, so that the compiler knows that no store changes it
  const Streams<P> s = streams;
  const int64_t next_block = count * static_cast<int64_t>(sizeof(T));  // it has about as many values
  fetch_ahead(s.exp_avg, count, next_block);
  fetch_ahead(s.exp_avg_sq, count, next_block);
  update_lanes<P, false, kAmsgrad>(c, s, 0, count, nullptr, 0, 0);
}

// Decays `size` weights as if all of them were outside the child network.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE void decay_only(const AdamWConstants<T>& constants, P* param, int size) {
  const AdamWConstants<T> c = constants;
  for (int j = 0; j < size; ++j) store(param[j], decayed_outside(c, load(param[j])));
}

// Returns how many of the child network's weights come before `begin`, a multiple of 128; -1 if bits and offsets have
// been changed since they were counted: a step stops where they leave the state's arrays.
CHILDTUNE_INLINE int64_t first_offset(const PackedMask& child, int64_t begin) {
  const int64_t packed_block = begin / kPackedBlock;
  const int64_t offset = child.offsets[packed_block];
  if (offset < 0 || offset > child.count) return -1;
  return offset + count_bits(child.bits + packed_block * (kPackedBlock / 8), begin % kPackedBlock / 8);
}

// The weights of a packed block from `at` on, as far as `end`.
struct ChildPart {
  int size, bytes;      // how many there are; bytes of the mask, rounded up to whole kTogether
  const uint8_t* bits;  // of the mask
  bool copied;          // whether they must be copied to buffers: not contiguous, or the mask's bytes reach beyond them
};

CHILDTUNE_INLINE ChildPart child_part(const StepItem& item, int64_t at, int64_t end) {
  const int64_t left_in_block = kPackedBlock - at % kPackedBlock;
  const int size = static_cast<int>(left_in_block < end - at ? left_in_block : end - at);
  return {size, (size + kTogether - 1) / kTogether * (kTogether / 8), item.child.bits + at / 8,
          item.layout != nullptr || size % kTogether != 0};
}

// Goes through the weights [begin, end), of which begin is a multiple of 128, by packed blocks: compresses the child
// network's into `moved`, and their places into `places` unless that is nullptr, calls update(part, at, offset, n) for
// the n of them from `at` on, whose state begins at `offset`, decays the others if asked, and expands what was updated.
template <class P, class T, class Places, class Update>
CHILDTUNE_INLINE void for_each_child_part(const StepItem& item, const AdamWConstants<T>& c, int64_t begin, int64_t end,
                                          ChildBuffers<P>& moved, Places places, Update update) {
  int64_t offset = first_offset(item.child, begin);
  P copied_param[kPackedBlock], copied_grad[kPackedBlock];
  for (int64_t at = begin; at < end && offset >= 0;) {
    const ChildPart part = child_part(item, at, end);
    P* param = static_cast<P*>(item.data[kParam]) + at;
    const P* grad = static_cast<const P*>(item.data[kGrad]) + at;
    if (part.copied) {
      gather(item, kParam, at, part.size, copied_param);
      gather(item, kGrad, at, part.size, copied_grad);
      param = copied_param;
      grad = copied_grad;
    }
    const int64_t n = moved.compress(part.bits, part.bytes, param, grad, places);
    if (n > item.child.count - offset) return;
    update(part, at, offset, n);
    if (item.decay_outside) decay_only(c, param, part.size);
    moved.expand(part.bits, part.bytes, param, grad);
    if (part.copied) scatter(item, kParam, at, part.size, copied_param);
    offset += n;
    at += part.size;
  }
}

// Steps the weights [begin, end), of which begin is a multiple of 128.
template <class P, bool kAmsgrad>
void step_child(const StepItem& item, int64_t begin, int64_t end) {
  using T = typename ComputeType<P>::type;
  const auto c = item.constants.cast<T>();
  ChildBuffers<P> moved;
  for_each_child_part<P>(item, c, begin, end, moved, nullptr,
                         [&](const ChildPart&, int64_t, int64_t offset, int64_t n) CHILDTUNE_LAMBDA {
                           const Streams<typename ChildBuffers<P>::Stored> s{
                               moved.param, moved.grad, static_cast<T*>(item.data[kExpAvg]) + offset,
                               static_cast<T*>(item.data[kExpAvgSq]) + offset,
                               kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + offset : nullptr};
                           update_dense<kAmsgrad>(c, s, n);
                         });
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
