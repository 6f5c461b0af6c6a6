// Uses every core header in device code: compiling it (`make cuda`) is the test, it is never run.
#include "core/adamw.h"
#include "core/codes.h"
#include "core/constants.h"
#include "core/dtypes.h"
#include "core/fisher.h"
#include "core/mask.h"
#include "core/packed_mask.h"
#include "core/philox.h"
#include "core/rounding.h"
#include "core/score_key.h"
#include "core/scored_tensor.h"
#include "core/squares_item.h"
#include "core/step_item.h"

namespace childtune {

template <class P, bool kAmsgrad>
__global__ void step(AdamWConstants<double> constants, MaskKey key, uint32_t keep_threshold, P* param, const P* grad,
                     typename ComputeType<P>::type* state, int64_t count) {
  using T = typename ComputeType<P>::type;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const AdamWConstants<T> c = constants.template cast<T>();
  T updated = load(param[i]);
  adamw_update<kAmsgrad>(c, keep_element(key, i, keep_threshold), T(load(grad[i])), updated, state[i], state[count + i],
                         state[2 * count + i]);
  store(param[i], updated);
}

template __global__ void step<float, false>(AdamWConstants<double>, MaskKey, uint32_t, float*, const float*, float*,
                                            int64_t);
template __global__ void step<double, true>(AdamWConstants<double>, MaskKey, uint32_t, double*, const double*, double*,
                                            int64_t);
template __global__ void step<BFloat16, true>(AdamWConstants<double>, MaskKey, uint32_t, BFloat16*, const BFloat16*,
                                              float*, int64_t);
template __global__ void step<Float16, false>(AdamWConstants<double>, MaskKey, uint32_t, Float16*, const Float16*,
                                              float*, int64_t);

template <class P>
__global__ void add_squares(typename ComputeType<P>::type weight, typename ComputeType<P>::type grad_factor,
                            const P* grad, float* score, bool* finite, int64_t count) {
  using T = typename ComputeType<P>::type;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const T g = load(grad[i]);
  add_square(weight, grad_factor, g, score[i]);
  if (non_finite_bit(g) >> (8 * sizeof(g) - 1)) *finite = false;
}

template __global__ void add_squares<float>(float, float, const float*, float*, bool*, int64_t);
template __global__ void add_squares<double>(double, double, const double*, float*, bool*, int64_t);
template __global__ void add_squares<Float16>(float, float, const Float16*, float*, bool*, int64_t);

__global__ void clear_outside(PackedMask child, float* values, int64_t numel) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < numel && !in_child(child.bits, i)) values[i] = 0;
}

// Rounds averages to codes, of blocks of which the scales are known.
__global__ void encode_averages(MaskKey key, const uint8_t* scales, float* exp_avg, float* exp_avg_sq, uint8_t* codes,
                                BFloat16* param, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const RoundingWords words = rounding_words(key, static_cast<uint64_t>(i / kCodeBlock));
  const uint32_t j = static_cast<uint32_t>(i % kCodeBlock), scale = scales[i / kCodeBlock];
  float unused = 0;
  sanitize(exp_avg[i], exp_avg_sq[i], unused);
  codes[i] = encode_average(exp_avg[i], inverse_scale_of(scale), rounding_bits(words.exp_avg, j));
  codes[count + i] = encode_square(exp_avg_sq[i], least_square_of(scale), rounding_bits(words.exp_avg_sq, j));
  store_random(param[i], decode_average(codes[i], scale_of(scale)), rounding_bits(words.param, j));
}

__global__ void score_keys(const float* scores, uint32_t* keys, uint32_t* nan, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  keys[i] = score_key(scores[i], 0);
  nan[i] = nan_bit(scores[i]) >> 31;
}

}  // namespace childtune
