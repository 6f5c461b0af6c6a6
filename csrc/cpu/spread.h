// What the random bits of a block's elements are beyond the block's word: core/rounding.h's spread_of, as a table.
#pragma once

#include "core/rounding.h"
#include "cpu/isa.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kSpreadShift = 12;  // bits that encoding does not take: it takes twenty

struct SpreadTable {
  alignas(64) uint32_t of[kMaskBlock];

  constexpr SpreadTable() : of() {
    for (uint32_t j = 0; j < kMaskBlock; ++j) of[j] = spread_of(j) >> kSpreadShift;
  }
};
constexpr SpreadTable kSpreadTable;

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
