// What the random bits of elements are beyond their blocks' words, core/rounding.h's spread_of, as a table.
#pragma once

#include "core/packed_mask.h"
#include "core/rounding.h"
#include "cpu/isa.h"

namespace childtune {
namespace CHILDTUNE_ISA {
namespace {

constexpr int kSpreadShift = 12;  // bits that encoding does not take: it takes twenty, and spread_of has thirteen zeros

// The places of a packed block's elements: what each adds to its block's word, without the bits that encoding does not
// take, and in the low bits the number of its block. So the first kMaskBlock are what a block's elements add.
struct Places {
  alignas(64) uint32_t of[kPackedBlock];

  constexpr Places() : of() {
    for (uint32_t j = 0; j < kPackedBlock; ++j) of[j] = spread_of(j % kMaskBlock) >> kSpreadShift | j / kMaskBlock;
  }
};
constexpr Places kPlaces;

}  // namespace
}  // namespace CHILDTUNE_ISA
}  // namespace childtune
