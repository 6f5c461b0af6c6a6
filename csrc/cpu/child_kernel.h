// The compact step of a child network over a range of one parameter. Included by cpu/step_kernel.h only.
//
// Per block of 1024 weights: the child network's weights and gradients are collected in buffers that stay in the
// first-level cache, updated there as one dense array together with their compact state, and put back.

#include "cpu/child_lanes.h"

// Updates `count` weights, all of them.
template <bool kAmsgrad, class T>
CHILDTUNE_OUT_OF_LINE void update_dense(const AdamWConstants<T>& constants, const Block<T>& block, int64_t count) {
  const AdamWConstants<T> c = constants;  // its own copy, which no store can change
  const Block<T> b = block;
  const int64_t next_block = count * static_cast<int64_t>(sizeof(T));  // about as many values
  fetch_ahead(b.exp_avg, count, next_block);
  fetch_ahead(b.exp_avg_sq, count, next_block);
  update_lanes<T, false, kAmsgrad>(c, b, 0, count, nullptr, 0, 0);
}

// A weight outside the child network with decay="all": what the update does without gradient and state.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE void decay_only(const AdamWConstants<T>& c, P* param, int size) {
  const T before = c.decay_before, after = c.decay_after;
  for (int j = 0; j < size; ++j) store(param[j], load(param[j]) * before * after);
}

// begin is a multiple of 128.
template <class P, bool kAmsgrad>
void step_child(const StepItem& item, int64_t begin, int64_t end) {
  using T = typename ComputeType<P>::type;
  const auto c = item.constants.cast<T>();
  const PackedMask& child = item.child;
  const int64_t block = begin / kRankBlock;
  int64_t rank = child.ranks[block];
  if (rank < 0 || rank > child.count) return;  // not what was counted when the mask was made
  rank += count_bits(child.bits + block * (kRankBlock / 8), begin % kRankBlock / 8);
  P copied_param[kRankBlock], copied_grad[kRankBlock];
  T child_param[kRankBlock + kTogether] = {}, child_grad[kRankBlock + kTogether] = {};
  for (int64_t at = begin; at < end;) {
    const int64_t left_in_block = kRankBlock - at % kRankBlock;
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
    const int64_t n = collect(bits, bytes, param, grad, child_param, child_grad);
    if (n > child.count - rank) return;  // nor are these
    Block<T> b{child_param, child_grad, static_cast<T*>(item.data[kExpAvg]) + rank,
               static_cast<T*>(item.data[kExpAvgSq]) + rank,
               kAmsgrad ? static_cast<T*>(item.data[kMaxExpAvgSq]) + rank : nullptr};
    update_dense<kAmsgrad>(c, b, n);
    if (item.decay_outside) decay_only(c, param, size);
    put_back(bits, bytes, child_param, param, grad);
    if (copied) scatter(item, kParam, at, size, copied_param);
    rank += n;
    at += size;
  }
}
