"""Radix select over several GPUs: the passes of csrc/cuda/select_kernel.h, and what the host does between them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..native import gpu
from .packed_mask import packed_size

_DIGITS = 1 << 11  # number of values of a digit; a kernel on a GPU counts digits of 11 bits in one pass


def select_in_parts(parts: list["OnGpu"], k: int) -> dict[int, Tensor] | None:
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


class OnGpu:
    """The passes over the scores on one GPU.

    Attributes:
        scores: {number of a tensor among all: its scores, float32 and contiguous}.
        bits: {number of a tensor among all: bits of its mask}, written by the passes.
    """

    def __init__(self, device: int, scores: dict[int, Tensor], largest: bool) -> None:
        self.device, self.scores, self.largest = gpu.place(device), scores, largest
        self.kernels, self.stream = gpu.load_kernels(device), gpu.stream_of(device)
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
