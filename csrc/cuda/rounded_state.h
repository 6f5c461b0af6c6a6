// The state of a RoundedItem on a GPU: a lane's four values of each average in a mask block, as they are stored, and as
// floats in a Quad. cuda/rounded_kernel.h and cuda/rounded_child_kernel.h share it.
//
// One kernel serves every kind of state, with amsgrad and without: the answer is the same for all lanes of a warp, so
// that asking costs little. Without amsgrad, the maximum so far is minus infinity, which makes the second moment its
// own maximum, with all its bits.
#pragma once

#include "core/codes.h"
#include "core/dtypes.h"
#include "core/rounding.h"
#include "core/step_item.h"
#include "cuda/quad.h"
#include "cuda/step_kernel.h"
#include "cuda/step_table.h"

namespace childtune {

// A number for each average; of what is not stored, it is not used.
struct PerAverage {
  uint32_t of[kAverages];
};

CHILDTUNE_INLINE Four<float>& average_of(Quad<float>& quad, int average) {
  return average == 0 ? quad.exp_avg : average == 1 ? quad.exp_avg_sq : quad.max_exp_avg_sq;
}

CHILDTUNE_INLINE uint32_t word_of(const RoundingWords& words, int average) {
  return average == 0 ? words.exp_avg : average == 1 ? words.exp_avg_sq : words.max_exp_avg_sq;
}

CHILDTUNE_INLINE int averages_of(const RoundedItem& item) { return item.data[kMaxExpAvgSq] == nullptr ? 2 : 3; }

// Calls visitor.visit(V{}), where V is the type that a kind of state is stored in. Compilers of GPU code take no lambda
// with a parameter of any type.
template <class Visitor>
CHILDTUNE_INLINE void visit_state(StateKind kind, const Visitor& visitor) {
  if (kind == StateKind::kCodes) {
    visitor.visit(uint8_t{});
  } else if (kind == StateKind::kBFloat16) {
    visitor.visit(BFloat16{});
  } else {
    visitor.visit(float{});
  }
}

CHILDTUNE_INLINE float decoded(int, float stored, float) { return stored; }
CHILDTUNE_INLINE float decoded(int, BFloat16 stored, float) { return load(stored); }
CHILDTUNE_INLINE float decoded(int average, uint8_t code, float scale) {
  return average == 0 ? decode_average(code, scale) : decode_square(code, scale);
}

CHILDTUNE_INLINE void encode(int, float value, uint32_t, uint32_t, float& to) { to = value; }
CHILDTUNE_INLINE void encode(int, float value, uint32_t, uint32_t random, BFloat16& to) {
  store_random(to, value, random);
}
CHILDTUNE_INLINE void encode(int average, float value, uint32_t scale, uint32_t random, uint8_t& to) {
  to = average == 0 ? encode_average(value, inverse_scale_of(scale), random)
                    : encode_square(value, least_square_of(scale), random);
}

// Returns the scales of the item's mask block `block`. Those of a block beyond the last one are not read.
CHILDTUNE_INLINE PerAverage load_scales(const RoundedItem& item, int64_t block) {
  PerAverage scales{};
  if (item.state != StateKind::kCodes || block * kMaskBlock >= item.numel) return scales;
  CHILDTUNE_UNROLLED
  for (int a = 0; a < kAverages; ++a) {
    if (a < averages_of(item)) scales.of[a] = item.scales[a][block];
  }
  return scales;
}

// Returns the scales for values of which the largest magnitudes have these bits.
CHILDTUNE_INLINE PerAverage scales_for(const PerAverage& most) {
  PerAverage scales;
  CHILDTUNE_UNROLLED
  for (int a = 0; a < kAverages; ++a) scales.of[a] = scale_byte(most.of[a]);
  return scales;
}

// Writes the scales of the item's mask block `block`, if there is one. One lane must do so, after all have read.
CHILDTUNE_INLINE void store_scales(const RoundedItem& item, int64_t block, const PerAverage& scales) {
  if (block * kMaskBlock >= item.numel) return;
  CHILDTUNE_UNROLLED
  for (int a = 0; a < kAverages; ++a) {
    if (a < averages_of(item)) item.scales[a][block] = static_cast<uint8_t>(scales.of[a]);
  }
}

template <int kCount, class Stored>
struct StateDecoder {
  const Stored& stored;
  const PerAverage& scales;
  int first;
  Quad<float>& quad;

  template <class V>
  CHILDTUNE_MEMBER void visit(V value) const {
    CHILDTUNE_UNROLLED
    for (int a = 0; a < kAverages; ++a) {
      CHILDTUNE_UNROLLED
      for (int i = 0; i < kCount; ++i) {
        stored.get(a, i, value);
        average_of(quad, a).of[first + i] = decoded(a, value, scale_of(scales.of[a]));
      }
    }
  }
};

// Sets kCount of the quad's averages, from the one numbered `first` on, to what `stored` holds: stored.get(average, i,
// to) must set `to` to value i as it is stored.
template <int kCount, class Stored>
CHILDTUNE_INLINE void decode_state(const RoundedItem& item, const Stored& stored, const PerAverage& scales, int first,
                                   Quad<float>& quad) {
  visit_state(item.state, StateDecoder<kCount, Stored>{stored, scales, first, quad});
  const float none = bit_cast<float>(0xFF800000u);
  CHILDTUNE_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    if (averages_of(item) < kAverages) quad.max_exp_avg_sq.of[first + i] = none;
  }
}

// Makes the quad's averages such as codes can hold, and returns the bits of the largest magnitudes among those values
// that exist: the bits of `exist` say which.
CHILDTUNE_INLINE PerAverage sanitize_state(uint32_t exist, Quad<float>& quad) {
  PerAverage most{};
  CHILDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    sanitize(quad.exp_avg.of[i], quad.exp_avg_sq.of[i], quad.max_exp_avg_sq.of[i]);
    CHILDTUNE_UNROLLED
    for (int a = 0; a < kAverages; ++a) {
      const uint32_t magnitude = bits_of(average_of(quad, a).of[i]) & 0x7FFFFFFFu;
      if ((exist >> i & 1) != 0 && magnitude > most.of[a]) most.of[a] = magnitude;
    }
  }
  return most;
}

// Stores a weight, by nearest or stochastic rounding.
template <class P>
CHILDTUNE_INLINE void store_weight(const RoundedItem& item, float value, uint32_t random, P& to) {
  if (item.stochastic) {
    store_random(to, value, random);
  } else {
    store(to, value);
  }
}

}  // namespace childtune
