// The digests that test_known.cpp compares; tests/ops/test_known_answers.py reads them too.
#pragma once

#include <cstdint>

constexpr uint32_t kKnownWeights = 5003;

struct KnownAnswer {
  const char* mode;
  uint64_t float32, float64, bfloat16, float16;
};

constexpr KnownAnswer kKnownAnswers[] = {
    {"F", 0x15cd0ef5bdeda45a, 0x40dc7cde1e57d9bf, 0x85a100a874aa0a67, 0x1a5103e33dadb503},
    {"all weights", 0x576483b0cda500f2, 0xf969b18f5b0c4c28, 0xa92291818185c470, 0xd0c070d51aeb6213},
    {"D", 0x17f5a9d90932a34d, 0xd4a47fbc0335522c, 0x4a821d419ad20c1b, 0xe8004efc2de8564a},
};
