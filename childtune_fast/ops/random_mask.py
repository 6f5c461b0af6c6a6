"""The random mask of Child-Tuning_F in pure torch, with the same bits as csrc/core/philox.h and csrc/core/mask.h."""

import itertools
import math
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_seed

MASK_VERSION = 1  # changes whenever elements use other Philox words; csrc/core/mask.h documents version 1
KEEP_ALL = 1 << 16  # the threshold that keeps every weight
BLOCK = 128  # elements that share 16 counters
_COUNTERS = 16
_CHUNK_BLOCKS = 1 << 15  # blocks drawn at once; limits the temporary memory to about 34 MB
_LOW32 = 0xFFFFFFFF
_LOW = 0 if sys.byteorder == "little" else 1  # which int32 half of an int64 has its low bits


def keep_threshold(reserve_p: float) -> int:
    """Returns how many of the 65536 values of a 16-bit random number keep a weight: `round(reserve_p * 65536)`.

    Raises:
        TypeError: `reserve_p` is not a real number.
        ValueError: `reserve_p` lies outside (0, 1], is NaN, or is so small that no weight would ever be kept.
    """
    if isinstance(reserve_p, bool) or not isinstance(reserve_p, (int, float)):
        raise TypeError(f"reserve_p must be a float in (0, 1] (got {type(reserve_p).__name__})")
    if not 0 < reserve_p <= 1:
        raise ValueError(f"reserve_p, the share of weights updated in each step, must lie in (0, 1] (got {reserve_p})")
    threshold = round(reserve_p * KEEP_ALL)
    if threshold == 0:
        raise ValueError(f"reserve_p must be at least 1/131072, else no weight is ever updated (got {reserve_p})")
    return threshold


def philox4x32_10(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Computes the random words of the generator Philox4x32-10 (Salmon et al., SC 2011) for many counters.

    Args:
        counter: int64 tensor of shape [4, n], contiguous, which holds unsigned 32-bit words. It is overwritten.
        key: two unsigned 32-bit words.

    Returns:
        int32 tensor of shape [4, n] in the memory of `counter`: the words, of which int32 has the same bits.
    """
    words = counter.view(torch.int32)[:, _LOW::2]
    even, even_low = counter[::2].unbind(), words[::2]  # words 0 and 2, and their int32 halves
    # The low half of a product is a word of the next round as it lies there: words 1 and 3 stay in the product.
    product, spare = _Products(torch.empty_like(counter[1::2])), _Products(counter[1::2])
    for i in range(10):
        torch.mul(even[1], 0xCD9E8D57, out=product.rows[0])  # 64 bits; what is beyond 2^63 wraps, which is harmless
        torch.mul(even[0], 0xD2511F53, out=product.rows[1])
        torch.bitwise_xor(product.high, spare.low, out=even_low)
        even[0].bitwise_xor_((key[0] + i * 0x9E3779B9) & _LOW32)
        even[1].bitwise_xor_((key[1] + i * 0xBB67AE85) & _LOW32)
        product, spare = spare, product
    return words


class _Products:
    """Two rows of 64-bit products, and views of their 32-bit halves."""

    def __init__(self, products: Tensor) -> None:
        halves = products.view(torch.int32)
        self.rows, self.low, self.high = products.unbind(), halves[:, _LOW::2], halves[:, 1 - _LOW :: 2]


def bernoulli_mask(
    shape: int | Sequence[int],
    reserve_p: float,
    *,
    seed: int,
    step: int,
    param_index: int,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns the mask that `ChildAdamW` without `child` applies to a parameter in a step (Child-Tuning_F).

    Source: Xu, Luo et al., EMNLP 2021, section 2.2. The mask is a pure function of the arguments. Nothing is drawn from
    torch's random state, and an element's value depends on its flat index but not on the shape or the device.

    Args:
        shape: shape of the parameter, or of a piece of it that is consecutive in the parameter's flat order.
        reserve_p: share of weights whose gradient is used, in (0, 1]; it is rounded to a multiple of 1/65536.
        seed: the optimizer's seed (`opt.seed`), an integer of 64 bits, signed or unsigned.
        step: the parameter's own step count, 1 at its first step, an integer in [0, 2**32).
        param_index: index of the parameter in the optimizer, from 0, counted through all groups, an integer in
            [0, 2**32).
        offset: flat index of the first element of `shape` in the whole parameter, an integer in [0, 2**62)
            (default: 0).
        device: device of the result (default: "cpu").

    Returns:
        bool tensor of shape `shape`: True where the weight's gradient is used.

    Raises:
        TypeError: an argument is no number of the required kind.
        ValueError: an argument lies outside its range.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    threshold = keep_threshold(reserve_p)
    seed = check_seed(seed)
    for name, value, bits in (("step", step, 32), ("param_index", param_index, 32), ("offset", offset, 62)):
        if not isinstance(value, Integral):
            raise TypeError(f"bernoulli_mask: {name} must be an integer (got {type(value).__name__})")
        if not 0 <= value < 1 << bits:
            raise ValueError(f"bernoulli_mask: {name} must lie in [0, 2**{bits}) (got {value})")
    if threshold == KEEP_ALL:
        return torch.ones(shape, dtype=torch.bool, device=device)
    mask = torch.empty(count, dtype=torch.bool, device=device)
    end = -(-(offset + count) // BLOCK)  # blocks
    for first in range(offset // BLOCK, end, _CHUNK_BLOCKS):
        blocks = min(_CHUNK_BLOCKS, end - first)
        kept = kept_elements([Blocks(first, blocks, param_index)], threshold, seed, step, device)
        low, high = max(offset, first * BLOCK), min(offset + count, (first + blocks) * BLOCK)
        mask[low - offset : high - offset] = kept[low - first * BLOCK : high - first * BLOCK]
    return mask.view(shape)


class Blocks(NamedTuple):
    """Neighbouring blocks of a parameter.

    Attributes:
        first: number of the first block in the whole parameter.
        length: how many blocks there are.
        param_index: index of the parameter in the optimizer.
    """

    first: int
    length: int
    param_index: int


def kept_elements(pieces: Sequence[Blocks], threshold: int, seed: int, step: int, device: torch.device | str) -> Tensor:
    """Draws the masks of pieces of many parameters at once; holds at most 8 bytes an element while it does.

    Args:
        pieces: the blocks to draw, one or more.
        threshold: how many of the 65536 values of a random number keep a weight, below 65536.
        seed: the optimizer's seed, unsigned.
        step: the parameters' step count.
        device: device of the result.

    Returns:
        bool tensor of shape [128 * number of all blocks]: whether the elements are kept, piece by piece.
    """
    ends = list(itertools.accumulate(piece.length for piece in pieces))
    rows = [(p.length, p.first - end + p.length, p.param_index) for p, end in zip(pieces, ends, strict=True)]
    # Not waiting for the copy is safe on CUDA, where the driver takes the few numbers before it returns.
    table = torch.tensor(rows, device="cpu").to(device, non_blocking=torch.device(device).type == "cuda").T
    first, index = table[1:].repeat_interleave(table[0], dim=1, output_size=ends[-1]).unsqueeze(2)
    counter = torch.empty((4, ends[-1], _COUNTERS), dtype=torch.int64, device=device)
    number = torch.arange(ends[-1] * _COUNTERS, device=device).view(-1, _COUNTERS).add_(first, alpha=_COUNTERS)
    torch.bitwise_and(number, _LOW32, out=counter[0])
    torch.bitwise_right_shift(number, 32, out=counter[1])
    del number
    counter[2] = step
    counter[3] = index
    words = philox4x32_10(counter.view(4, -1), (seed & _LOW32, seed >> 32))
    return _halves_below(words, threshold)


def _halves_below(words: Tensor, threshold: int) -> Tensor:
    """Returns whether the unsigned 16-bit halves of words are below a threshold, in the order of their elements."""
    below = torch.empty((words.shape[1] // _COUNTERS, 4, 2, _COUNTERS), dtype=torch.bool, device=words.device)
    words.bitwise_xor_(0x80008000 - (1 << 32))  # now the order of unsigned halves is that of signed ones
    limit = (threshold - (1 << 15)) << 16
    words = words.view(4, -1, _COUNTERS).transpose(0, 1)  # block, word, counter
    torch.lt(words, limit, out=below[:, :, 1])  # whatever the low halves are
    torch.lt(words << 16, limit, out=below[:, :, 0])
    return below.view(-1)
