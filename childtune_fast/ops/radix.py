"""Radix select over several devices: the passes of csrc/cuda/select_kernel.h, by kernels or in torch.

The passes are those over the scores on one device; between them the host adds up what they count.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..native import gpu
from .packed_mask import BLOCK, pack, packed_size

DIGITS = 1 << 11  # number of values of a digit; a kernel on a GPU counts digits of 11 bits in one pass
_BLOCK_BYTES = BLOCK // 8  # of a mask
_CHUNK_BLOCKS = 1 << 10  # that torch works on at once; a chunk's temporaries take about 25 MB


class Part(Protocol):
    """The passes over the scores on one device."""

    def count_digits(self, wanted: int, wanted_shift: int, shift: int) -> Tensor:
        """Counts the digits at bit `shift` of the keys whose higher bits, from `wanted_shift` on, are `wanted`.

        Returns:
            int64 tensor of shape [DIGITS + 1] on the CPU: how many keys have each digit; the last entry is above 0 if
            a score is NaN.
        """

    def write_above(self, key: int) -> dict[int, Tensor]:
        """Selects the keys above `key`.

        Returns:
            {number of a tensor: int32 tensor on the CPU that counts the keys equal to `key` in each block of 1024}.
        """

    def add_ties(self, key: int, taken: dict[int, Tensor]) -> dict[int, Tensor]:
        """Selects the first keys equal to `key` in each block of 1024, as many as `taken` says; returns the bits."""


def select_in_parts(parts: Sequence[Part], k: int) -> dict[int, Tensor] | None:
    """Selects `k` keys over several devices, in the passes of csrc/cuda/select_kernel.h.

    Returns:
        {number of a tensor: bits of its mask}; None if a score is NaN.
    """
    if not parts:
        return {}
    found = find_limit(lambda *digit: torch.stack([part.count_digits(*digit) for part in parts]).sum(dim=0), k)
    return None if found is None else write_bits(parts, *found)


def find_limit(count_digits: Callable[[int, int, int], Tensor], k: int) -> tuple[int, int] | None:
    """Finds the key that separates the `k` highest keys from the others.

    Args:
        count_digits: what `Part.count_digits` is for a part, for all parts together.
        k: number of keys to select.

    Returns:
        (key, left): the keys above `key` are selected, and `left` of those equal to it; None if a score is NaN.
    """
    left, key, wanted_shift = k, 0, 32
    for shift in (21, 10, 0):  # the digits have 11, 11 and 10 bits
        counts, nan = count_digits(key, wanted_shift, shift).split([DIGITS, 1])
        if nan:
            return None
        counts = counts[: 1 << (wanted_shift - shift)]
        reached = counts.flip(0).cumsum(0).flip(0)  # keys of this digit or a higher one
        digit = int((reached >= left).nonzero()[-1])
        left -= int(reached[digit] - counts[digit])
        key, wanted_shift = key << (wanted_shift - shift) | digit, shift
    return key, left


def count_ties(part: Part, key: int) -> int:
    """Returns how many keys equal `key`."""
    return int(part.count_digits(key >> 1, 1, 0)[key & 1])  # a digit has a bit or more


def write_bits(parts: Sequence[Part], key: int, left: int) -> dict[int, Tensor]:
    """Selects the keys above `key`, and the first `left` of those equal to it; returns the bits as `add_ties` does."""
    ties = _merged(part.write_above(key) for part in parts)
    in_order = [ties[i] for i in sorted(ties)]  # in the order of the tensors, not of the devices
    of_all = torch.cat(in_order)
    before = of_all.cumsum(0) - of_all
    taken = (left - before).clamp(min=0).minimum(of_all).split([of_one.numel() for of_one in in_order])
    return _merged(part.add_ties(key, dict(enumerate(taken))) for part in parts)


def _merged(of_parts: Iterable[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {i: tensor for of_part in of_parts for i, tensor in of_part.items()}


class OnGpu:
    """The passes over the scores on one GPU, by kernels.

    Attributes:
        scores: {number of a tensor among all: its scores, float32 and contiguous}.
        bits: {number of a tensor among all: bits of its mask}, from `write_above` on.
    """

    def __init__(self, device: int, scores: dict[int, Tensor], largest: bool) -> None:
        self.device, self.scores, self.largest = gpu.place(device), scores, largest
        self.kernels, self.stream = gpu.load_kernels(device), gpu.stream_of(device)
        self.bits: dict[int, Tensor] = {}

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def count_digits(self, wanted: int, wanted_shift: int, shift: int) -> Tensor:
        """Does what `Part.count_digits` says."""
        found = self._zeros(DIGITS + 1, torch.int64)
        counts, nan = found[:-1], found[-1:].view(torch.uint8)[:1]
        digit = wanted, wanted_shift, shift
        self.kernels.count_digits(list(self.scores.values()), self.largest, *digit, counts, nan, self.stream)
        return found.cpu()

    def write_above(self, key: int) -> dict[int, Tensor]:
        """Does what `Part.write_above` says."""
        self.bits = {i: self._zeros(packed_size(tensor.numel()), torch.uint8) for i, tensor in self.scores.items()}
        sizes = [self.kernels.tie_counts(tensor.numel()) for tensor in self.scores.values()]
        ties = self._zeros(sum(sizes), torch.int32)
        self._write(self.kernels.write_above, key, ties)
        return dict(zip(self.scores, ties.cpu().split(sizes), strict=True))

    def add_ties(self, key: int, taken: dict[int, Tensor]) -> dict[int, Tensor]:
        """Does what `Part.add_ties` says."""
        ties = torch.cat([taken[i] for i in self.scores]).to(self.device, torch.int32)
        self._write(self.kernels.add_ties, key, ties)
        return self.bits

    def _write(self, kernel: Callable[..., None], key: int, ties: Tensor) -> None:
        kernel(list(self.scores.values()), self.largest, key, list(self.bits.values()), ties, self.stream)


class InTorch:
    """The passes over the scores on one device, in torch, on chunks: what they take does not grow with the scores.

    A chunk is a list of (number of a tensor, its first block of 1024, how many blocks). Its keys, int32, are those of
    csrc/core/score_key.h less 2^31, in rows of a block. The last row of a tensor is filled up with the key of a NaN,
    which is below all others.
    """

    def __init__(self, device: torch.device, scores: dict[int, Tensor], largest: bool) -> None:
        self.device, self.largest = device, largest
        self.scores = {i: tensor.view(-1).view(torch.int32) for i, tensor in scores.items()}
        self.sizes = {i: packed_size(tensor.numel()) for i, tensor in scores.items()}
        self.bits: dict[int, Tensor] = {}
        self.chunks: list[list[tuple[int, int, int]]] = []
        room = 0
        for i, size in self.sizes.items():
            first, end = 0, size // _BLOCK_BYTES
            while first < end:
                if room == 0:
                    self.chunks.append([])
                    room = _CHUNK_BLOCKS
                blocks = min(room, end - first)
                self.chunks[-1].append((i, first, blocks))
                first, room = first + blocks, room - blocks

    def _keys(self, chunk: list[tuple[int, int, int]]) -> Tensor:
        fill = -1 if self.largest else 0x7FFFFFFF
        keys = torch.full((sum(blocks for *_, blocks in chunk) * BLOCK,), fill, dtype=torch.int32, device=self.device)
        pieces = [self.scores[i][first * BLOCK : (first + blocks) * BLOCK] for i, first, blocks in chunk]
        places = keys.split([blocks * BLOCK for *_, blocks in chunk])
        torch._foreach_copy_([place[: len(piece)] for place, piece in zip(places, pieces, strict=True)], pieces)
        negate = keys >> 31
        keys.bitwise_and_(0x7FFFFFFF).bitwise_xor_(negate).sub_(negate)
        return (keys if self.largest else keys.neg_()).view(-1, BLOCK)

    def count_digits(self, wanted: int, wanted_shift: int, shift: int) -> Tensor:
        """Does what `Part.count_digits` says."""
        counts = torch.zeros(DIGITS + 2, dtype=torch.int64, device=self.device)  # the last two: NaN, not wanted
        for chunk in self.chunks:
            keys = self._keys(chunk).view(-1)
            nan = keys.abs() > 0x7F800000
            digits = keys >> shift
            if wanted_shift < 32:
                unwanted = (keys >> wanted_shift) != wanted - (1 << 31 >> wanted_shift)
                digits.bitwise_and_((1 << (wanted_shift - shift)) - 1).masked_fill_(unwanted, DIGITS + 1)
            else:
                digits.add_(1 << 31 >> shift)
            counts += digits.masked_fill_(nan, DIGITS).bincount(minlength=DIGITS + 2)
        found = counts[:-1].cpu()
        found[-1] -= sum(self.sizes.values()) * 8 - sum(map(len, self.scores.values()))
        return found

    def write_above(self, key: int) -> dict[int, Tensor]:
        """Does what `Part.write_above` says."""
        self.bits = {i: torch.zeros(size, dtype=torch.uint8, device=self.device) for i, size in self.sizes.items()}
        ties = [torch.zeros(0, dtype=torch.int32, device=self.device)]
        for chunk in self.chunks:
            keys = self._keys(chunk)
            self._add(chunk, keys > key - (1 << 31))
            ties.append((keys == key - (1 << 31)).sum(dim=1, dtype=torch.int32))
        sizes = [bits.numel() // _BLOCK_BYTES for bits in self.bits.values()]
        return dict(zip(self.bits, torch.cat(ties).cpu().split(sizes), strict=True))

    def add_ties(self, key: int, taken: dict[int, Tensor]) -> dict[int, Tensor]:
        """Does what `Part.add_ties` says."""
        for chunk in self.chunks:
            of_blocks = torch.cat([taken[i][first : first + blocks] for i, first, blocks in chunk])
            if of_blocks.any():
                equal = self._keys(chunk) == key - (1 << 31)
                place = equal.cumsum(dim=1, dtype=torch.int32)  # from 1, among the keys equal to `key` in a block
                self._add(chunk, equal.logical_and_(place <= of_blocks.to(self.device, torch.int32)[:, None]))
        return self.bits

    def positions(self, key: int) -> Iterator[Tensor]:
        """Yields the flat positions of the keys equal to `key` in ascending order, int64; there must be one tensor."""
        for chunk in self.chunks:
            [(_, first, _)] = chunk
            yield (self._keys(chunk).view(-1) == key - (1 << 31)).nonzero().view(-1) + first * BLOCK

    def _add(self, chunk: list[tuple[int, int, int]], chosen: Tensor) -> None:
        """Adds selected keys of a chunk to the bits."""
        pieces = pack(chosen).split([blocks * _BLOCK_BYTES for *_, blocks in chunk])
        for (i, first, blocks), piece in zip(chunk, pieces, strict=True):
            self.bits[i][first * _BLOCK_BYTES : (first + blocks) * _BLOCK_BYTES].bitwise_or_(piece)
