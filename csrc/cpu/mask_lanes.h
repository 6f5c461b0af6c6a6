// The random bits of mask blocks, drawn by vectors of counters. Included by cpu/step_kernel.h only.
//
// Drawing is cut into parts, so that a block's bits can be drawn between the updates of the block before it: the update
// keeps the divider busy and little else, the generator everything but the divider.

struct MaskBits {
  alignas(64) uint32_t word[4][kMaskCounters];
};

#if defined(CHILDTUNE_VECTOR_BYTES)

// A counter in each 64-bit lane, in the low half: the product of the low halves of 64-bit lanes is the one widening product
// that every x86 set has, and the high halves may hold anything, because only low halves are multiplied and stored.
typedef uint64_t Lanes __attribute__((vector_size(CHILDTUNE_VECTOR_BYTES)));
constexpr int kWide = CHILDTUNE_VECTOR_BYTES / 8;  // counters in a vector
constexpr int kRounds = 10;

CHILDTUNE_INLINE Lanes broadcast(uint64_t x) { return Lanes{} + x; }

CHILDTUNE_INLINE Lanes multiply_low(Lanes a, Lanes b) {
  return (Lanes)CHILDTUNE_MULTIPLY_LOW((CHILDTUNE_VECTOR)a, (CHILDTUNE_VECTOR)b);
}

struct MaskKeys {
  MaskKey key;
  Lanes round[kRounds][2];

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k) : key(k) {
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int r = 0; r < kRounds; ++r, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      round[r][0] = broadcast(key0);
      round[r][1] = broadcast(key1);
    }
  }
};

// Draws the bits of one block. Even counters in one vector, odd ones in the next: interleaved, they are in order.
CHILDTUNE_INLINE void draw(const MaskKeys& keys, uint64_t block, MaskBits* bits) {
  constexpr int kVectors = kMaskCounters / kWide;
  const uint64_t first = block * kMaskCounters;
  Lanes iota, c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int lane = 0; lane < kWide; ++lane) iota[lane] = 2 * lane;
  for (int i = 0; i < kVectors; ++i) {
    c0[i] = iota + (first + i / 2 * 2 * kWide + i % 2);
    c1[i] = broadcast(first >> 32);
    c2[i] = broadcast(keys.key.step);
    c3[i] = broadcast(keys.key.param_index);
  }
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kVectors; ++i) {
      const Lanes product0 = multiply_low(c0[i], broadcast(kPhiloxMultiplier0));
      const Lanes product1 = multiply_low(c2[i], broadcast(kPhiloxMultiplier1));
      c0[i] = (product1 >> 32) ^ (c1[i] ^ keys.round[round][0]);
      c2[i] = (product0 >> 32) ^ (c3[i] ^ keys.round[round][1]);
      c1[i] = product1;
      c3[i] = product0;
    }
  }
  const Lanes* words[4] = {c0, c1, c2, c3};
  for (int word = 0; word < 4; ++word) {
    for (int i = 0; i < kVectors; i += 2) {
      const Lanes merged = (words[word][i] & 0xFFFFFFFFu) | (words[word][i + 1] << 32);
      memcpy(bits->word[word] + i * kWide, &merged, sizeof merged);
    }
  }
}

#else

struct MaskKeys {
  MaskKey key;

  CHILDTUNE_MEMBER explicit MaskKeys(const MaskKey& k) : key(k) {}
};

CHILDTUNE_INLINE void draw(const MaskKeys& keys, uint64_t block, MaskBits* bits) {
  for (uint32_t j = 0; j < kMaskCounters; ++j) {
    const Philox4 words = mask_words(keys.key, block, j);
    for (int word = 0; word < 4; ++word) bits->word[word][j] = words.word[word];
  }
}

#endif
