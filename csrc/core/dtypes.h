// Storage types of parameters and gradients, and their conversion to and from the type that computes: bf16 and fp16
// widen to float exactly and narrow to nearest, ties to even. A NaN that is narrowed becomes the one without sign,
// since processors differ in the sign of the NaN that an operation makes. Only integer and float operations that
// vectorise everywhere.
#pragma once

#include "core/compiler.h"

namespace childtune {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that computes, and that the optimizer state is kept in.
template <class Storage>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

CHILDTUNE_INLINE float load(float x) { return x; }
CHILDTUNE_INLINE double load(double x) { return x; }
CHILDTUNE_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

CHILDTUNE_INLINE float load(Float16 x) {
  // Half's exponent and mantissa, moved into float's fields, are the value divided by 2^112, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t infinite = magnitude | 0x7F800000u;
  const uint32_t bits = magnitude >= 0x0F800000u ? infinite : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

CHILDTUNE_INLINE void store(float& to, float x) { to = x; }
CHILDTUNE_INLINE void store(double& to, double x) { to = x; }

CHILDTUNE_INLINE void store(BFloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

CHILDTUNE_INLINE void store(Float16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal: re-bias the exponent by 15 - 127 and round at bit 13. Where rounding up carries into the exponent, the
  // result is the next power of two, or infinity, as it must be.
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 puts the last bit of a half subnormal at the last bit of the float, which rounds it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t number = (magnitude >= 0x47800000u ? 0x7C00u : finite) | ((bits >> 16) & 0x8000u);
  to.bits = static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7E00u : number);
}

// Stochastic rounding to 16 bits: up with a probability that is the distance from the lower neighbour, by the high bits
// of `random` (core/rounding.h). Numbers that the type holds stay. Beyond the largest of them, and for NaN, it is
// rounding to nearest.
CHILDTUNE_INLINE void store_random(BFloat16& to, float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t added = magnitude < 0x7F7F0000u ? random >> 16 : 0x7FFFu + ((bits >> 16) & 1u);
  to.bits = static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : (bits + added) >> 16);
}

CHILDTUNE_INLINE void store_random(Float16& to, float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t added = magnitude < 0x477FE000u ? random >> 19 : 0xFFFu + ((magnitude >> 13) & 1u);
  const uint32_t normal = (magnitude - (112u << 23) + added) >> 13;
  // Subnormal: adding 2^-14 puts the last bit of a half subnormal at bit 13, where that of a normal number is.
  const uint32_t subnormal = ((bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p-14f) + added) >> 13) - 0x1C400u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t number = (magnitude >= 0x47800000u ? 0x7C00u : finite) | ((bits >> 16) & 0x8000u);
  to.bits = static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7E00u : number);
}

CHILDTUNE_INLINE void store_random(float& to, float x, uint32_t) { to = x; }

}  // namespace childtune
