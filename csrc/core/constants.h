// Everything in a step that does not depend on the element: computed in double, once per step for parameters that share
// it.
#pragma once

#include <cmath>

#include "core/compiler.h"

namespace childtune {

// A parameter group's hyper-parameters, as the optimizer was given them.
struct HyperParams {
  double lr, beta1, beta2, eps, weight_decay;
  double grad_factor;   // clip factor / GradScaler's scale, negative if maximize
  double keep_share;    // share of weights kept by the mask: gradients that survive are divided by it; 1 without a mask
  bool published_code;  // variant="hf": eps before the bias correction, decay after the update
};

// The constants of core/adamw.h's update, rounded once to the type that computes.
template <class T>
struct AdamWConstants {
  T grad_factor;
  T decay_before;
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T step_size;
  T bias_correction2_sqrt;
  T eps;
  T decay_after;

  template <class To>
  CHILDTUNE_MEMBER AdamWConstants<To> cast() const {
    return {To(grad_factor), To(decay_before),          To(beta1), To(one_minus_beta1), To(beta2), To(one_minus_beta2),
            To(step_size),   To(bias_correction2_sqrt), To(eps),   To(decay_after)};
  }
};

// base^exponent by repeated squaring: only multiplications, so every compiler, libm and device gives the same bits.
CHILDTUNE_INLINE double integer_power(double base, uint64_t exponent) {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// Returns the factor that limits the 2-norm of gradients to `max_norm`, as torch's clip_grad_norm_ computes it.
// `squares` is the sum of their squares before they are multiplied by `grad_factor`. If it is NaN, so is the factor.
CHILDTUNE_INLINE double clip_factor(double max_norm, double squares, double grad_factor) {
  const double factor = max_norm / (sqrt(squares) * fabs(grad_factor) + 1e-6);
  return factor >= 1.0 ? 1.0 : factor;
}

// The constants of a parameter's step number `step`, the first of which is 1.
CHILDTUNE_INLINE AdamWConstants<double> step_constants(const HyperParams& h, uint64_t step) {
  const double bias_correction1 = 1.0 - integer_power(h.beta1, step);
  const double bias_correction2_sqrt = sqrt(1.0 - integer_power(h.beta2, step));
  const double step_size = h.lr / bias_correction1;
  const double decay = 1.0 - h.lr * h.weight_decay;
  const double grad_factor = h.grad_factor / h.keep_share;
  AdamWConstants<double> c{grad_factor,   1.0,       h.beta1, 1.0 - h.beta1, h.beta2,
                           1.0 - h.beta2, step_size, 1.0,     h.eps,         1.0};
  if (h.published_code) {
    c.step_size = step_size * bias_correction2_sqrt;
    c.decay_after = decay;
  } else {
    c.bias_correction2_sqrt = bias_correction2_sqrt;
    c.decay_before = decay;
  }
  return c;
}

}  // namespace childtune
