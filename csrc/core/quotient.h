// The quotient of a root by its bias correction, for processors whose dividers are slow by a product: with the same
// bits.
#pragma once

#include <cmath>

#include "core/compiler.h"

namespace childtune {

// Returns root / divisor, rounded once, for a divisor whose inverse, 1 / divisor as a float, is at hand: where dividers
// are slow, this takes a third of their time. Roots are 0 or at least 2^-75, divisors 2^-27 to 1, so that nothing
// underflows. Where the product is within an ulp of the quotient, what is left is exact, and the result is the quotient
// by Markstein's theorem (IBM J. Res. Dev. 34, 1990). It is further from it, but less than 1.5 ulp, only if divisor and
// quotient both have mantissas just below 2; a test goes through those. If nothing is left, the product is the
// quotient; of an infinite root NaN is.
CHILDTUNE_INLINE float quotient_by_inverse(float root, float divisor, float inverse) {
  const float product = root * inverse;
  const float left = fmaf(-product, divisor, root);
  return left < 0.0f || left > 0.0f ? fmaf(left, inverse, product) : product;
}

// Returns root / divisor, where the divisor is the same for many roots.
CHILDTUNE_INLINE double quotient(double root, double divisor) { return root / divisor; }
CHILDTUNE_INLINE float quotient(float root, float divisor) {
#if defined(CHILDTUNE_QUOTIENT_BY_INVERSE)
  return quotient_by_inverse(root, divisor, 1.0f / divisor);
#else
  return root / divisor;
#endif
}

}  // namespace childtune
