"""Selection of exactly k weights, those with the highest or the lowest scores of many tensors, as packed masks."""

from functools import partial

import torch
from torch import Tensor

from ..arguments import is_sharded
from ..native import load
from . import reference, trust
from .packed_mask import PackedMask, packed_size
from .radix import InTorch, OnGpu, Part, select_in_parts


def top_k(scores: dict[str, Tensor], k: int, *, largest: bool = True) -> dict[str, PackedMask]:
    """Selects exactly `k` weights by their scores, over all tensors together.

    Scores are compared as float32; 0.0 equals -0.0, and infinities are the highest and lowest values. Of equal scores,
    the one in the earlier tensor is selected, then the one of the lower flat index, whether the highest or the lowest
    are selected. The compiled kernels, on the CPU and on GPUs, do not copy contiguous float32 scores.

    Scores may also be DTensors, sharded or replicated, with or without whole tensors beside them, which are then the
    same on every rank. The result is that for the whole scores, which no rank gathers, and the same on every rank. All
    ranks must call it, with the scores in one order.

    Args:
        scores: {name: tensor of any shape, float32, bfloat16 or float16}.
        k: number of weights to select, from 0 to the number of all scores.
        largest: whether the highest scores are selected, or else the lowest (default: True).

    Returns:
        {name: mask}, with the names of `scores` in the same order. Each mask is whole, and on the device of its scores;
        for a DTensor it is on the CPU.

    Raises:
        TypeError: a score has another dtype.
        ValueError: a score is NaN, on this rank or on another; `k` is out of range; or ranks have different scores for
            a tensor of which they hold the same part.
        BackendError: CHILDTUNE_BACKEND is "native", and there are no kernels for a device of the scores.
    """
    total = sum(tensor.numel() for tensor in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"top_k: k must lie between 0 and the number of scores, {total} (got {k})")
    if any(map(is_sharded, scores.values())):
        from .select_on_ranks import select

        return select(scores, k, largest, _float32, partial(_part, largest=largest))
    tensors = [_float32(name, tensor) for name, tensor in scores.items()]
    native = load.resolve("auto") if all(tensor.is_cpu for tensor in tensors) else None
    if native is None:
        bits = _select_by_device(list(scores), tensors, k, largest)
    else:
        bits = [torch.empty(packed_size(tensor.numel()), dtype=torch.uint8, device="cpu") for tensor in tensors]
        nan = native.select_top(tensors, bits, k, largest, torch.get_num_threads())
        if nan >= 0:
            reference.refuse_nan(list(scores)[nan])
    masks = map(PackedMask, (tensor.shape for tensor in tensors), bits)
    return dict(zip(scores, masks, strict=True))


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"scores must be float32, bfloat16 or float16 (got {tensor.dtype} for '{name}'); convert them with .float()"
        )
    return tensor.detach().to(torch.float32).resolve_neg().contiguous()


def _select_by_device(names: list[str], scores: list[Tensor], k: int, largest: bool) -> list[Tensor]:
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for i, tensor in enumerate(scores):
        by_device.setdefault(tensor.device, {})[i] = tensor
    bits = select_in_parts([_part(*part, largest) for part in by_device.items()], k)
    if bits is None:
        reference.refuse_nan(next(name for name, tensor in zip(names, scores, strict=True) if tensor.isnan().any()))
    return [bits[i] for i in range(len(scores))]


def _part(device: torch.device, scores: dict[int, Tensor], largest: bool) -> Part:
    on_gpu = next(iter(scores.values())).is_cuda
    if on_gpu and trust.kernels_of(device.index, load.chosen("auto")) is not None:
        return OnGpu(device.index, scores, largest)
    return InTorch(device, scores, largest)
