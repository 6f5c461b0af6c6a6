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

// Steps the weights [begin, end), of which begin is a multiple of 128.
template <class P, bool kAmsgrad>
void step_child(const StepItem& item, int64_t begin, int64_t end) {
  using T = typename ComputeType<P>::type;
  const auto c = item.constants.cast<T>();
  const PackedMask& child = item.child;
  const int64_t packed_block = begin / kPackedBlock;
  int64_t offset = child.offsets[packed_block];
  // Bits and offsets may have been changed since they were counted: the step stops where they leave the state's arrays.
  if (offset < 0 || offset > child.count) return;
  offset += count_bits(child.bits + packed_block * (kPackedBlock / 8), begin % kPackedBlock / 8);
  P copied_param[kPackedBlock], copied_grad[kPackedBlock];
  ChildBuffers<P> moved;
  for (int64_t at = begin; at < end;) {
    const int64_t left_in_block = kPackedBlock - at % kPackedBlock;
    const int size = static_cast<int>(left_in_block < end - at ? left_in_block : end - at);
    const int bytes = (size + kTogether - 1) / kTogether * (kTogether / 8);
    const uint8_t* bits = child.bits + at / 8;
    const bool copied = item.layout != nullptr || size % kTogether != 0;
    P* param = static_cast<P*>(item.data[kParam]) + at;
    const P* grad = static_cast<const P*>(item.data[kGrad]) + at;
    if (copied) {
      gather(item, kParam, at, size, copied_param);
      gather(item, kGrad, at, size, copied_grad);
      param = copied_param;
      grad = copied_grad;
    }
    const int64_t n = moved.compress(bits, bytes, param, grad);
    if (n > child.count - offset) return;
    Streams<typename ChildBuffers<P>::Stored> s{moved.param, moved.grad, static_cast<T*>(item.data[kExpAvg]) + offset,
                                                static_cast<T*>(item.data[kExpAvgSq]) + offset,
                                                kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + offset : nullptr};
    update_dense<kAmsgrad>(c, s, n);
    if (item.decay_outside) decay_only(c, param, size);
    moved.expand(bits, bytes, param, grad);
    if (copied) scatter(item, kParam, at, size, copied_param);
    offset += n;
    at += size;
  }
}

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
