// What a step does to one weight: the only place in C++ where this arithmetic is written, for CPU and GPU.
//
// One multiplication, addition, division or square root per operation, each rounded as IEEE 754 says: no contraction,
// no reciprocal. That is what makes the result the same bits everywhere. childtune_fast/ops/reference.py has the same
// arithmetic in torch.
#pragma once

#include <cmath>

#include "core/constants.h"
#include "core/quotient.h"

namespace childtune {

CHILDTUNE_INLINE float square_root(float x) { return sqrtf(x); }
CHILDTUNE_INLINE double square_root(double x) { return sqrt(x); }

// Updates the state of one weight; returns the second moment that its update divides by. `grad` is the gradient as
// autograd left it. A weight that the mask drops passes keep = false, and still moves by its momentum and decay. T is
// float or double. max_exp_avg_sq is read and written only with kAmsgrad.
template <bool kAmsgrad, class T>
CHILDTUNE_INLINE T update_moments(const AdamWConstants<T>& c, bool keep, T grad, T& exp_avg, T& exp_avg_sq,
                                  T& max_exp_avg_sq) {
  const T scaled = grad * c.grad_factor;
  const T g = keep ? scaled : T(0);
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * g;
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
  if (!kAmsgrad) return exp_avg_sq;
  max_exp_avg_sq = exp_avg_sq <= max_exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;  // a NaN gets through
  return max_exp_avg_sq;
}

// Returns a weight after its update, by its second moment's root. kDivides = false: bias_correction2_sqrt is 1 ("hf").
template <bool kDivides, class T>
CHILDTUNE_INLINE T updated_weight(const AdamWConstants<T>& c, T param, T exp_avg, T root) {
  const T denom = (kDivides ? quotient(root, c.bias_correction2_sqrt) : root) + c.eps;
  const T decayed = param * c.decay_before;
  return (decayed - c.step_size * exp_avg / denom) * c.decay_after;
}

// Returns what updated_weight does for moments of zero and an eps above it, without a root or a quotient.
template <class T>
CHILDTUNE_INLINE T updated_at_zero(const AdamWConstants<T>& c, T param, T exp_avg) {
  return (param * c.decay_before - c.step_size * exp_avg) * c.decay_after;
}

// Updates one weight and its state; the arguments are as above.
template <bool kAmsgrad, class T>
CHILDTUNE_INLINE void adamw_update(const AdamWConstants<T>& c, bool keep, T grad, T& param, T& exp_avg, T& exp_avg_sq,
                                   T& max_exp_avg_sq) {
  const T second_moment = update_moments<kAmsgrad>(c, keep, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  param = updated_weight<true>(c, param, exp_avg, square_root(second_moment));
}

// Returns a weight outside the child network after a step with decay="all". It has no gradient and no state, so it only
// decays, by the same two factors as in the update.
template <class T>
CHILDTUNE_INLINE T decayed_outside(const AdamWConstants<T>& c, T param) {
  return param * c.decay_before * c.decay_after;
}

}  // namespace childtune
