// The compact step of a child network over a range of one parameter. Included by cpu/step_kernel.h only.
//
// Per block of 1024 weights: the child network's weights and gradients are collected in buffers that stay in the
// first-level cache, updated there as one dense array together with their compact state, and put back.

// Of each byte of a mask: where its set bits are; how many lie below each bit, with the sign set where the bit itself
// is; and how many there are.
struct ByteTable {
  int8_t place[256][8], rank[256][8];
  uint8_t count[256];

  constexpr ByteTable() : place(), rank(), count() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = byte >> bit & 1;
        rank[byte][bit] = static_cast<int8_t>(set ? count[byte] - 128 : count[byte]);
        if (set) place[byte][count[byte]++] = static_cast<int8_t>(bit);
      }
    }
  }
};
constexpr ByteTable kByteTable;

CHILDTUNE_INLINE int64_t bits_in(uint8_t byte) {
#if defined(CHILDTUNE_AVX2)  // which comes with the instruction
  return __builtin_popcount(byte);
#else
  return kByteTable.count[byte];
#endif
}

CHILDTUNE_INLINE int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t n = 0;
  for (int64_t i = 0; i < bytes; ++i) n += bits_in(bits[i]);
  return n;
}

// collect_eight: of eight weights and their gradients, those at `place`, eight of each whatever the mask.
// put_eight: where the sign in `rank` is set, the value of that rank; elsewhere the weight keeps its bits.
template <class P, class T>
CHILDTUNE_INLINE void collect_eight(const int8_t* place, const P* param, const P* grad, T* child_param, T* child_grad) {
  for (int j = 0; j < 8; ++j) child_param[j] = load(param[place[j]]);
  for (int j = 0; j < 8; ++j) child_grad[j] = load(grad[place[j]]);
}
template <class P, class T>
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const T* child_param, P* param) {
  for (int j = 0; j < 8; ++j) {
    if (rank[j] < 0) store(param[j], child_param[rank[j] + 128]);
  }
}

#if defined(CHILDTUNE_AVX2)
CHILDTUNE_INLINE __m256i eight_indices(const int8_t* index) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
}
CHILDTUNE_INLINE __m256 load_eight(const float* from) { return _mm256_loadu_ps(from); }
CHILDTUNE_INLINE __m256 load_eight(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
CHILDTUNE_INLINE __m256 load_eight(const Float16* from) {
  float wide[8];
  for (int j = 0; j < 8; ++j) wide[j] = load(from[j]);
  return _mm256_loadu_ps(wide);
}

template <class P>
CHILDTUNE_INLINE void collect_eight(const int8_t* place, const P* param, const P* grad, float* child_param,
                                    float* child_grad) {
  const __m256i index = eight_indices(place);  // its low three bits count
  _mm256_storeu_ps(child_param, _mm256_permutevar8x32_ps(load_eight(param), index));
  _mm256_storeu_ps(child_grad, _mm256_permutevar8x32_ps(load_eight(grad), index));
}
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const float* child_param, float* param) {
  const __m256i index = eight_indices(rank);
  const __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), index);
  _mm256_storeu_ps(param, _mm256_blendv_ps(_mm256_loadu_ps(param), value, _mm256_castsi256_ps(index)));
}
template <class P>
CHILDTUNE_INLINE void put_eight(const int8_t* rank, const float* child_param, P* param) {
  static_assert(sizeof(P) == 2, "bf16 and fp16");
  const __m256i index = eight_indices(rank);
  float value[8];
  P stored[8];
  _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(_mm256_loadu_ps(child_param), index));
  for (int j = 0; j < 8; ++j) store(stored[j], value[j]);
  const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1));
  const __m128i sign = _mm_srai_epi16(mask, 15), now = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  __m128i* at = reinterpret_cast<__m128i*>(param);
  _mm_storeu_si128(at, _mm_blendv_epi8(_mm_loadu_si128(at), now, sign));
}
#endif

// Collects the child network's values among 8 * bytes weights; writes up to eight numbers more. Returns how many.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE int64_t collect(const uint8_t* bits, int64_t bytes, const P* param, const P* grad, T* child_param,
                                      T* child_grad) {
  int64_t n = 0;
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    collect_eight(kByteTable.place[byte], param + 8 * i, grad + 8 * i, child_param + n, child_grad + n);
    n += bits_in(byte);
  }
  return n;
}

// Puts the child network's weights back, and nothing beside them; reads up to eight numbers more. Meanwhile it fetches
// the next block's weights and gradients, which nothing else would while it works in the cache.
template <class P, class T>
CHILDTUNE_OUT_OF_LINE void put_back(const uint8_t* bits, int64_t bytes, const T* child_param, P* param, const P* grad) {
  CHILDTUNE_UNROLL_4
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = bits[i];
    if (i % 2 == 0) {
      CHILDTUNE_PREFETCH(param + kRankBlock + 8 * i);
      CHILDTUNE_PREFETCH(grad + kRankBlock + 8 * i);
    }
    put_eight(kByteTable.rank[byte], child_param, param + 8 * i);
    child_param += bits_in(byte);
  }
}

// Updates `count` weights, all of them, in whole groups of lanes: the last group is filled up in buffers, so that tail
// and body are the same arithmetic.
template <bool kAmsgrad, class T>
CHILDTUNE_OUT_OF_LINE void update_dense(const AdamWConstants<T>& constants, const Block<T>& block, int64_t count) {
  const AdamWConstants<T> c = constants;  // its own copy, which no store can change
  const Block<T> b = block;
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  update_lanes<T, false, kAmsgrad>(c, b, 0, whole, nullptr, 0, 0);
  if (rest == 0) return;
  T param[kLanes] = {}, grad[kLanes] = {};
  T exp_avg[kLanes] = {}, exp_avg_sq[kLanes] = {}, max_exp_avg_sq[kLanes] = {};
  memcpy(param, b.param + whole, rest * sizeof(T));
  memcpy(grad, b.grad + whole, rest * sizeof(T));
  memcpy(exp_avg, b.exp_avg + whole, rest * sizeof(T));
  memcpy(exp_avg_sq, b.exp_avg_sq + whole, rest * sizeof(T));
  if (kAmsgrad) memcpy(max_exp_avg_sq, b.max_exp_avg_sq + whole, rest * sizeof(T));
  const Block<T> filled{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq};
  update_lanes<T, false, kAmsgrad>(c, filled, 0, kLanes, nullptr, 0, 0);
  memcpy(b.param + whole, param, rest * sizeof(T));
  memcpy(b.exp_avg + whole, exp_avg, rest * sizeof(T));
  memcpy(b.exp_avg_sq + whole, exp_avg_sq, rest * sizeof(T));
  if (kAmsgrad) memcpy(b.max_exp_avg_sq + whole, max_exp_avg_sq, rest * sizeof(T));
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
  constexpr int kSlack = 8;
  const auto c = item.constants.cast<T>();
  const PackedMask& child = item.child;
  const int64_t block = begin / kRankBlock;
  int64_t rank = child.ranks[block];
  if (rank < 0 || rank > child.count) return;  // not what was counted when the mask was made
  rank += count_bits(child.bits + block * (kRankBlock / 8), begin % kRankBlock / 8);
  P copied_param[kRankBlock], copied_grad[kRankBlock];
  T child_param[kRankBlock + kSlack] = {}, child_grad[kRankBlock + kSlack] = {};
  for (int64_t at = begin; at < end;) {
    const int64_t left_in_block = kRankBlock - at % kRankBlock;
    const int size = static_cast<int>(left_in_block < end - at ? left_in_block : end - at), bytes = (size + 7) / 8;
    const uint8_t* bits = child.bits + at / 8;
    const bool copied = item.layout != nullptr || size % 8 != 0;
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
