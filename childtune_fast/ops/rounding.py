"""Stochastic rounding in pure torch, with the same bits as csrc/core/rounding.h and csrc/core/dtypes.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from .random_mask import BLOCK, philox4x32_10

ROUNDING_VERSION = 1  # changes whenever elements use other Philox words; csrc/core/rounding.h documents version 1
_LOW32 = 0xFFFFFFFF
_DOMAIN = 0x80000000  # in the counter's second word, where masks have less
_REVERSED = [int(f"{j:07b}"[::-1], 2) << 25 for j in range(BLOCK)]  # the bits of an element's place in its block
_NAN_BITS = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}


class RoundingBits(NamedTuple):
    """The random bits of neighbouring elements, for each array that is rounded: int64, unsigned 32-bit numbers."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    param: Tensor
    max_exp_avg_sq: Tensor


def rounding_bits(
    count: int, *, seed: int, step: int, param_index: int, offset: int, device: torch.device
) -> RoundingBits:
    """Draws the random bits of elements [offset, offset + count) of a parameter, by flat index.

    Args:
        count: how many elements there are.
        seed: the optimizer's seed, unsigned.
        step: the parameter's own step count, 1 at its first step.
        param_index: index of the parameter in the optimizer, counted through all groups.
        offset: flat index of the first element in the whole parameter, a multiple of 128.
        device: device of the result.
    """
    blocks = -(-count // BLOCK)
    number = torch.arange(offset // BLOCK, offset // BLOCK + blocks, dtype=torch.int64, device=device)
    counter = torch.empty((4, blocks), dtype=torch.int64, device=device)
    torch.bitwise_and(number, _LOW32, out=counter[0])
    torch.bitwise_right_shift(number, 32, out=counter[1])
    counter[1] += _DOMAIN
    counter[2] = step
    counter[3] = param_index
    words = philox4x32_10(counter, (seed & _LOW32, seed >> 32)).to(torch.int64)
    spread = torch.tensor(_REVERSED, dtype=torch.int64, device=device)
    bits = (words.bitwise_and_(_LOW32).unsqueeze(2) ^ spread).view(4, -1)[:, :count]
    return RoundingBits(*bits.unbind())


def stored_randomly(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Returns float32 values as parameters of a dtype hold them, rounded stochastically.

    Args:
        values: float32 tensor.
        dtype: bfloat16 or float16; values of any other stay.
        random: the values' random bits, int64 of the same shape.
    """
    if dtype not in _NAN_BITS:
        return values
    bits = values.view(torch.int32).to(torch.int64).bitwise_and_(_LOW32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        added = torch.where(magnitude < 0x7F7F0000, random >> 16, 0x7FFF + ((bits >> 16) & 1))
        number = (bits + added) >> 16
    else:
        added = torch.where(magnitude < 0x477FE000, random >> 19, 0xFFF + ((magnitude >> 13) & 1))
        shifted = (values.abs() + 2.0**-14).view(torch.int32).to(torch.int64)
        subnormal = ((shifted + added) >> 13) - 0x1C400
        normal = (magnitude - (112 << 23) + added) >> 13
        number = torch.where(magnitude < 0x38800000, subnormal, normal)
        number = torch.where(magnitude >= 0x47800000, 0x7C00, number) | ((bits >> 16) & 0x8000)
    number = torch.where(magnitude > 0x7F800000, _NAN_BITS[dtype], number)
    return number.to(torch.int16).view(dtype)
