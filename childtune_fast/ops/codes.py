"""The codes of 8-bit state in pure torch, with the same bits as csrc/core/codes.h, which says what they mean."""

from typing import NamedTuple

import torch
from torch import Tensor

from .random_mask import BLOCK

NEAREST = 0x80000000  # in place of random bits: rounds to nearest
_LEAST_SCALE = 32
_ROOM = 0x001000FF
_MOST_BITS = (254 << 23) - _ROOM - 1
_SHIFT = 2.0**-15
_SHIFT_CODE = 112 << 3


class Codes(NamedTuple):
    """An array of 8-bit state, flat.

    Attributes:
        codes: uint8, a code for each value, in order.
        scales: uint8, the scale of each block of 128 elements of the parameter, see csrc/core/codes.h.
    """

    codes: Tensor
    scales: Tensor


def block_count(numel: int) -> int:
    """Returns how many scales a parameter of `numel` elements has for each array of its state."""
    return -(-numel // BLOCK)


def block_numbers(numel: int, child: Tensor | None, device: torch.device) -> Tensor:
    """Returns the number of the block of each value of a state.

    Args:
        numel: elements of the parameter.
        child: bool, flat: which elements the state has values of; None for all.
        device: device of the result.
    """
    numbers = torch.arange(numel, device=device).div_(BLOCK, rounding_mode="floor")
    return numbers if child is None else numbers[child]


def sanitize(exp_avg: Tensor, squares: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns float32 values such as codes can hold, as csrc/core/codes.h says; `squares` has one or two tensors."""
    most = torch.tensor(_MOST_BITS, dtype=torch.int32, device="cpu").view(torch.float32).item()
    lost = ~exp_avg.isfinite() | squares[0].isnan()
    kept = [torch.where(lost | square.isnan(), 0.0, square).clamp(max=most) for square in squares]
    return torch.where(lost, 0.0, exp_avg).clamp(-most, most), kept


def scales_of(values: Tensor, blocks: Tensor, count: int) -> Tensor:
    """Returns the scale of each of `count` blocks, uint8, given float32 values and the numbers of their blocks."""
    magnitudes = values.abs().view(torch.int32).to(torch.int64)
    most = torch.zeros(count, dtype=torch.int64, device=values.device)
    most.scatter_reduce_(0, blocks, magnitudes, "amax")
    exponent = ((most + _ROOM) >> 23).clamp(min=_LEAST_SCALE)
    return torch.where(most == 0, 0, exponent).to(torch.uint8)


def decode_average(coded: Codes, blocks: Tensor) -> Tensor:
    """Returns the float32 values of an average; `blocks` are the numbers of their blocks."""
    codes = coded.codes.to(torch.int32)
    shifted = (((codes & 0x7F) + _SHIFT_CODE) << 20).view(torch.float32)
    value = torch.where(codes < 0x80, shifted - _SHIFT, -shifted + _SHIFT)  # never -0
    return value * _factors(coded.scales)[blocks]


def decode_square(coded: Codes, blocks: Tensor) -> Tensor:
    """Returns the float32 values of an average of squares; `blocks` are the numbers of their blocks."""
    codes = coded.codes.to(torch.int32)
    return ((codes << 20) + (96 << 23)).view(torch.float32) * _factors(coded.scales)[blocks]


def encode_average(values: Tensor, blocks: Tensor, count: int, random: Tensor | int) -> Codes:
    """Returns the codes of an average.

    Args:
        values: float32, flat, finite as `sanitize` makes them.
        blocks: the numbers of their blocks.
        count: how many blocks there are.
        random: the values' random bits, int64; or NEAREST.
    """
    scales = scales_of(values, blocks, count)
    inverse = ((254 - scales_in_use(scales)) << 23).view(torch.float32)[blocks]
    shifted = (values.abs() * inverse + _SHIFT).view(torch.int32).to(torch.int64)
    number = ((shifted + (random >> 12)) >> 20) - _SHIFT_CODE
    return Codes((number | (values.signbit().to(torch.int64) << 7)).to(torch.uint8), scales)


def encode_square(values: Tensor, blocks: Tensor, count: int, random: Tensor | int) -> Codes:
    """Returns the codes of an average of squares; the arguments are those of `encode_average`."""
    scales = scales_of(values, blocks, count)
    least = ((scales_in_use(scales) - 31) << 23)[blocks]
    above = (values.view(torch.int32) - least).clamp(min=0).to(torch.int64)
    return Codes(((above + (random >> 12)) >> 20).to(torch.uint8), scales)


def scales_in_use(scales: Tensor) -> Tensor:
    """Returns the scales as int32, with that of blocks of zeros replaced by one that has an inverse."""
    return torch.where(scales == 0, _LEAST_SCALE, scales.to(torch.int32))


def _factors(scales: Tensor) -> Tensor:
    return (scales.to(torch.int32) << 23).view(torch.float32)
