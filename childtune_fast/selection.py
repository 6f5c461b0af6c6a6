"""The k highest, or lowest, of all scores in a list of tensors, as packed masks; exact, with deterministic ties."""

import itertools

import torch
from torch import Tensor

from . import backend
from .packed_mask import PackedMask, packed_size


def top_k(scores: dict[str, Tensor], k: int, *, largest: bool = True) -> dict[str, PackedMask]:
    """Selects exactly `k` weights by their scores, over all tensors together.

    Scores are compared as float32: 0.0 equals -0.0, infinities are in order. Of equal scores the one with the lower
    index is taken, in both directions: the earlier tensor, then the lower flat index. Contiguous float32 scores on the
    CPU are not copied.

    Args:
        scores: by name, float32, bfloat16 or float16, of any shape.
        k: how many to select, from 0 to the number of all scores.
        largest: the highest scores, else the lowest (default: True).

    Returns:
        A mask for each tensor, by the same names in the same order, on the device of its scores.

    Raises:
        TypeError: scores of another dtype.
        ValueError: a score is NaN, or `k` is out of range.
    """
    total = sum(tensor.numel() for tensor in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"top_k: k must lie between 0 and the number of scores, {total} (got {k})")
    tensors = [_float32(name, tensor) for name, tensor in scores.items()]
    native = backend.resolve("auto") if all(tensor.is_cpu for tensor in tensors) else None
    if native is None:
        bits = _select(list(scores), tensors, k, largest)
    else:
        bits = [torch.empty(packed_size(tensor.numel()), dtype=torch.uint8) for tensor in tensors]
        nan = native.select_top(tensors, bits, k, largest, torch.get_num_threads())
        if nan >= 0:
            _refuse_nan(list(scores)[nan])
    masks = map(PackedMask, (tensor.shape for tensor in tensors), bits)
    return dict(zip(scores, masks, strict=True))


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"scores must be float32, bfloat16 or float16 (got {tensor.dtype} for '{name}'); convert them with .float()"
        )
    return tensor.detach().to(torch.float32).resolve_neg().contiguous()


def _refuse_nan(name: str) -> None:
    raise ValueError(f"scores must not be NaN (got one or more for '{name}'); find the batch that made them")


def _select(names: list[str], scores: list[Tensor], k: int, largest: bool) -> list[Tensor]:
    """csrc/cpu/selection.cpp in torch: the specification. Sorts integers of the same order as the scores."""
    keys = []
    for name, tensor in zip(names, scores, strict=True):
        if tensor.isnan().any():
            _refuse_nan(name)
        float_bits = tensor.reshape(-1).view(torch.int32)
        magnitude = float_bits & 0x7FFFFFFF
        keys.append(torch.where(float_bits < 0, -magnitude, magnitude).to(scores[0].device))
    if not keys:
        return []
    order = torch.cat(keys).argsort(descending=largest, stable=True)
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    chosen[order[:k]] = True
    ends = list(itertools.accumulate(tensor.numel() for tensor in scores))
    pieces = [chosen[end - tensor.numel() : end] for tensor, end in zip(scores, ends, strict=True)]
    return [PackedMask.pack(piece.to(s.device)).bits for piece, s in zip(pieces, scores, strict=True)]
