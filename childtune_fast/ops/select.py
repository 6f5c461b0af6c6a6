"""Selection of exactly k weights, those with the highest or the lowest scores of many tensors, as packed masks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..native import gpu, load
from . import reference
from .packed_mask import PackedMask, packed_size

_DIGITS = 1 << 11  # number of values of a digit; a kernel on a GPU counts digits of 11 bits in one pass


def top_k(scores: dict[str, Tensor], k: int, *, largest: bool = True) -> dict[str, PackedMask]:
    """Selects exactly `k` weights by their scores, over all tensors together.

    Scores are compared as float32; 0.0 equals -0.0, and infinities are the highest and lowest values. Of equal scores,
    the one in the earlier tensor is selected, then the one of the lower flat index, whether the highest or the lowest
    are selected. The compiled kernels, on the CPU and on GPUs, do not copy contiguous float32 scores.

    Args:
        scores: {name: tensor of any shape, float32, bfloat16 or float16}.
        k: number of weights to select, from 0 to the number of all scores.
        largest: whether the highest scores are selected, or else the lowest (default: True).

    Returns:
        {name: mask}, with the names of `scores` in the same order; each mask is on the device of its scores.

    Raises:
        TypeError: a score has another dtype.
        ValueError: a score is NaN, or `k` is out of range.
        BackendError: CHILDTUNE_BACKEND is "native", and there are no kernels for a device of the scores.
    """
    total = sum(tensor.numel() for tensor in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"top_k: k must lie between 0 and the number of scores, {total} (got {k})")
    tensors = [_float32(name, tensor) for name, tensor in scores.items()]
    native = load.resolve("auto") if all(tensor.is_cpu for tensor in tensors) else None
    if tensors and all(tensor.is_cuda for tensor in tensors) and load.wants_gpu_kernels("auto"):
        bits = _select_on_gpus(list(scores), tensors, k, largest)
    elif native is None:
        bits = reference.select(list(scores), tensors, k, largest)
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


def _select_on_gpus(names: list[str], scores: list[Tensor], k: int, largest: bool) -> list[Tensor]:
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for i, tensor in enumerate(scores):
        by_device.setdefault(tensor.device, {})[i] = tensor
    bits = _select_in_parts([_OnGpu(*part, largest) for part in by_device.items()], k)
    if bits is None:
        reference.refuse_nan(next(name for name, tensor in zip(names, scores, strict=True) if tensor.isnan().any()))
    return [bits[i] for i in range(len(scores))]


def _select_in_parts(parts: list["_OnGpu"], k: int) -> dict[int, Tensor] | None:
    """Selects `k` keys over several GPUs, in the passes of csrc/cuda/select_kernel.h.

    Returns:
        {number of a tensor: bits of its mask}; None if a score is NaN.
    """
    left, key, wanted_shift = k, 0, 32
    for shift in (21, 10, 0):  # the digits have 11, 11 and 10 bits
        found = torch.stack([part.count_digits(key, wanted_shift, shift) for part in parts]).sum(dim=0)
        counts, nan = found.split([_DIGITS, 1])
        if nan:
            return None
        counts = counts[: 1 << (wanted_shift - shift)]
        reached = counts.flip(0).cumsum(0).flip(0)  # keys of this digit or a higher one
        digit = int((reached >= left).nonzero()[-1])
        left -= int(reached[digit] - counts[digit])
        key, wanted_shift = key << (wanted_shift - shift) | digit, shift
    ties = _merged(part.write_above(key) for part in parts)
    in_order = [ties[i] for i in sorted(ties)]  # in the order of the tensors, not of the GPUs
    of_all = torch.cat(in_order)
    before = of_all.cumsum(0) - of_all
    taken = (left - before).clamp(min=0).minimum(of_all).split([of_one.numel() for of_one in in_order])
    return _merged(part.add_ties(key, dict(enumerate(taken))) for part in parts)


def _merged(of_parts: Iterable[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {i: tensor for of_part in of_parts for i, tensor in of_part.items()}


class _OnGpu:
    """The passes over the scores on one GPU.

    Attributes:
        scores: {number of a tensor among all: its scores, float32 and contiguous}.
        bits: {number of a tensor among all: bits of its mask}, written by the passes.
    """

    def __init__(self, device: torch.device, scores: dict[int, Tensor], largest: bool) -> None:
        self.device, self.scores, self.largest = device, scores, largest
        self.kernels, self.stream = gpu.load_kernels(device.index), gpu.stream_of(device.index)
        self.bits = {i: self._zeros(packed_size(tensor.numel()), torch.uint8) for i, tensor in scores.items()}

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def count_digits(self, wanted: int, wanted_shift: int, shift: int) -> Tensor:
        """Counts the digits at bit `shift` of the keys whose higher bits, from `wanted_shift` on, are `wanted`.

        Returns:
            int64 tensor of shape [_DIGITS + 1] on the CPU: how many keys have each digit; the last entry is above 0 if
            a score is NaN.
        """
        found = self._zeros(_DIGITS + 1, torch.int64)
        counts, nan = found[:-1], found[-1:].view(torch.uint8)[:1]
        digit = wanted, wanted_shift, shift
        self.kernels.count_digits(list(self.scores.values()), self.largest, *digit, counts, nan, self.stream)
        return found.cpu()

    def write_above(self, key: int) -> dict[int, Tensor]:
        """Selects the keys above `key`.

        Returns:
            {number of a tensor: int32 tensor on the CPU that counts the keys equal to `key` in each block of 1024}.
        """
        sizes = [self.kernels.tie_counts(tensor.numel()) for tensor in self.scores.values()]
        ties = self._zeros(sum(sizes), torch.int32)
        self._write(self.kernels.write_above, key, ties)
        return dict(zip(self.scores, ties.cpu().split(sizes), strict=True))

    def add_ties(self, key: int, taken: dict[int, Tensor]) -> dict[int, Tensor]:
        """Selects the first keys equal to `key` in each block of 1024, as many as `taken` says; returns the bits."""
        ties = torch.cat([taken[i] for i in self.scores]).to(self.device, torch.int32)
        self._write(self.kernels.add_ties, key, ties)
        return self.bits

    def _write(self, kernel: Callable[..., None], key: int, ties: Tensor) -> None:
        kernel(list(self.scores.values()), self.largest, key, list(self.bits.values()), ties, self.stream)
