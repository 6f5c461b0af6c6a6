"""The random mask of Child-Tuning_F in pure torch, with the same bits as csrc/core/philox.h and csrc/core/mask.h."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..arguments import check_seed

MASK_VERSION = 1  # changes whenever elements use other Philox words; csrc/core/mask.h documents version 1
KEEP_ALL = 1 << 16  # the threshold that keeps every weight
_BLOCK = 128  # elements that share 16 counters
_COUNTERS = 16
_CHUNK_BLOCKS = 1 << 15  # blocks drawn at once; limits the temporary memory to about 30 MB
_LOW32 = 0xFFFFFFFF


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


def philox4x32_10(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Returns the random words of the generator Philox4x32-10 (Salmon et al., SC 2011) for many counters.

    Args:
        counter: four int64 tensors of one shape, which hold unsigned 32-bit words.
        key: two unsigned 32-bit words.

    Returns:
        Four int64 tensors of the counters' shape, which hold unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0  # 64 bits; a product beyond 2^63 wraps, which the masks below undo
        product1 = 0xCD9E8D57 * c2
        c0 = ((product1 >> 32) & _LOW32) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _LOW32) ^ c3 ^ key1
        c1 = product1 & _LOW32
        c3 = product0 & _LOW32
        key0 = (key0 + 0x9E3779B9) & _LOW32
        key1 = (key1 + 0xBB67AE85) & _LOW32
    return [c0, c1, c2, c3]


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
    for start in range(offset // _BLOCK, (offset + count + _BLOCK - 1) // _BLOCK, _CHUNK_BLOCKS):
        end = min(start + _CHUNK_BLOCKS, (offset + count + _BLOCK - 1) // _BLOCK)
        kept = _random16(start, end, seed, step, param_index, device) < threshold
        first, last = max(offset, start * _BLOCK), min(offset + count, end * _BLOCK)
        mask[first - offset : last - offset] = kept[first - start * _BLOCK : last - start * _BLOCK]
    return mask.view(shape)


def _random16(start: int, end: int, seed: int, step: int, param_index: int, device: torch.device | str) -> Tensor:
    """Returns the 16-bit random numbers of the blocks [start, end), one for each element, in the elements' order."""
    number = torch.arange(start * _COUNTERS, end * _COUNTERS, device=device).view(-1, 1, _COUNTERS)
    counter = [number & _LOW32, number >> 32, torch.full_like(number, step), torch.full_like(number, param_index)]
    words = torch.cat(philox4x32_10(counter, (seed & _LOW32, seed >> 32)), dim=1)  # block, word, counter
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()  # block, word, half, counter
