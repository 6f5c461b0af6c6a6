"""Selection where scores are cut over ranks: the passes of radix.py, with counts that are summed over the ranks.

A rank is one more part of the scores. It sends counts, 16 KB at a time, and no scores. Masks become whole one tensor
after the other, so that beside them a rank needs memory only for its part of one tensor's bits, one in 32 of its
scores' bytes, for a count of four bytes for each 1024 of these scores, and for a chunk.

This module is imported only when there is a DTensor, as shards.py is.
"""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..arguments import is_sharded
from . import reference
from .packed_mask import PackedMask, pack, packed_size, unpack
from .radix import DIGITS, InTorch, Part, count_ties, find_limit, write_bits
from .ranks import Split, worst
from .shards import local_part, local_tensor

_INDEX_BITS = 11  # of a flat index, which are found with one sum over the ranks
_CHUNK_BYTES = 1 << 16  # of a mask that become whole with one sum over the ranks
_CHUNK = 1 << 16  # ties that are looked at at once


def select(
    scores: Mapping[str, Tensor],
    k: int,
    largest: bool,
    prepared: Callable[[str, Tensor], Tensor],
    part_of: Callable[[torch.device, dict[int, Tensor]], Part],
) -> dict[str, PackedMask]:
    """Selects `k` weights as `top_k` documents; all ranks must come here.

    Args:
        scores: {name: scores}, of which one or more are DTensors.
        k: number of weights to select.
        largest: whether the highest scores are selected, or else the lowest.
        prepared: returns the scores of a tensor, given its name and what this rank holds, float32 and contiguous.
        part_of: makes the passes over scores on one device.
    """
    passes = _Passes(scores, (k, largest), prepared, part_of)
    limit = find_limit(passes.count_digits, k)
    if limit is None:
        nan = passes.sums({name: int(own.isnan().any()) for name, own in passes.own.items()})
        reference.refuse_nan(next(name for name in scores if nan[name]))
    key, left = limit
    own_ties = {name: count_ties(passes.part(name), key) for name in scores}
    ties = passes.sums(own_ties)
    masks = {}
    for name, tensor in scores.items():
        taken = min(left, ties[name])
        left -= taken
        own_taken = own_ties[name] if taken == ties[name] else passes.own_share(name, key, taken)
        bits = write_bits([passes.part(name)], key, own_taken)[0]
        masks[name] = whole_mask(bits, tensor) if is_sharded(tensor) else PackedMask(tensor.shape, bits)
    return masks


class _Passes:
    """The passes over the scores on all ranks.

    Attributes:
        scores: {name: scores}, of which one or more are DTensors.
        own: {name: what this rank holds of the scores, float32 and contiguous}.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        wanted: tuple[int, bool],
        prepared: Callable[[str, Tensor], Tensor],
        part_of: Callable[[torch.device, dict[int, Tensor]], Part],
    ) -> None:
        self.scores, self._wanted, self._part_of = scores, wanted, part_of
        self.own = {name: prepared(name, local_tensor(tensor)) for name, tensor in scores.items()}
        self._meshes = [tensor.device_mesh for tensor in scores.values() if is_sharded(tensor)]
        self._names: dict[Split, list[str]] = {}  # in one order on all ranks
        for name in scores:
            self._names.setdefault(self._split(name), []).append(name)

    def _split(self, name: str) -> Split:
        """Returns the ranks whose counts are added for a tensor; none but this one if it holds the whole tensor."""
        tensor = self.scores[name]
        return Split.of(tensor) if is_sharded(tensor) else Split(self._meshes[0], ())

    def part(self, *names: str) -> Part:
        """Returns the passes over what this rank holds of tensors that are on one device, numbered from 0."""
        return self._part_of(self.own[names[0]].device, {i: self.own[name] for i, name in enumerate(names)})

    def count_digits(self, wanted: int, wanted_shift: int, shift: int) -> Tensor:
        """Counts digits on all ranks, as `Part.count_digits` does; raises ValueError if the ranks do not agree."""
        total = torch.zeros(DIGITS + 1, dtype=torch.int64, device="cpu")
        for split, names in self._names.items():
            by_device: dict[torch.device, list[str]] = {}
            for name in names:
                by_device.setdefault(self.own[name].device, []).append(name)
            parts = [self.part(*of_device) for of_device in by_device.values()]
            counts = torch.stack([part.count_digits(wanted, wanted_shift, shift) for part in parts])
            total += split.sum(counts.sum(dim=0))
        seen = int.from_bytes(hashlib.sha256(repr((total.tolist(), self._wanted)).encode()).digest()[:7], "big")
        if worst(seen, self._meshes) != -worst(-seen, self._meshes):
            raise ValueError(
                "scores must be the same on all ranks where these hold the same part of a tensor, and so must the "
                "share to select (got others on one of them); average whole scores over the ranks first"
            )
        return total

    def sums(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Returns the sums over the ranks of a number for each tensor."""
        found: dict[str, int] = {}
        for split, names in self._names.items():
            summed = split.sum(torch.tensor([numbers[name] for name in names], device="cpu"))
            found |= zip(names, summed.tolist(), strict=True)
        return found

    def own_share(self, name: str, key: int, taken: int) -> int:
        """Returns how many of the first `taken` keys equal to `key` in a tensor, of more, this rank holds.

        The flat index of the last of them is found digit by digit, as the key was.
        """
        tensor, own = self.scores[name], self.own[name]
        if taken == 0 or not is_sharded(tensor):
            return taken
        split, part = Split.of(tensor), local_part(tensor)
        in_torch = InTorch(own.device, {0: own}, self._wanted[1])
        left, index, own_taken = taken, 0, 0
        last_shift = (tensor.numel() - 1).bit_length() - 1
        for shift in range(last_shift // _INDEX_BITS * _INDEX_BITS, -1, -_INDEX_BITS):
            counts = torch.zeros((1 << _INDEX_BITS) + 1, dtype=torch.int64, device=own.device)
            for positions in in_torch.positions(key):
                for some in positions.split(_CHUNK):
                    indices = part.flat_indices(some)
                    digits = (indices >> shift) - (index << _INDEX_BITS)
                    digits.masked_fill_(indices >> shift >> _INDEX_BITS != index, 1 << _INDEX_BITS)
                    counts += digits.bincount(minlength=(1 << _INDEX_BITS) + 1)
            counts = counts[:-1].cpu()
            reached = split.sum(counts).cumsum(0)
            digit = int((reached >= left).nonzero()[0])
            left -= int(reached[:digit][-1:].sum())
            own_taken += int(counts[:digit].sum())
            index = index << _INDEX_BITS | digit
        return own_taken + int(counts[digit])


def whole_mask(bits: Tensor, tensor: DTensor) -> PackedMask:
    """Returns a whole mask, on the CPU, given the bits of a DTensor's part; all ranks of its mesh must come here.

    Each rank writes its bits where they lie in the whole mask, a chunk at a time, and the sum over the ranks has all.

    Args:
        bits: uint8 tensor, the packed mask of what this rank holds of `tensor`.
        tensor: the DTensor.
    """
    split, part = Split.of(tensor), local_part(tensor)
    if not split.dims:
        return PackedMask(tensor.shape, bits.cpu())
    whole = torch.empty(packed_size(tensor.numel()), dtype=torch.uint8, device="cpu")
    for first in range(0, len(whole), _CHUNK_BYTES):
        chunk = whole[first : first + _CHUNK_BYTES]
        begin, size = 8 * first, 8 * len(chunk)
        low, high = part.position(begin), part.position(begin + size)
        if low == high:
            own = torch.zeros(len(chunk), dtype=torch.uint8, device=bits.device)
        elif high - low == size and low % 8 == 0:  # nearly always, in a tensor that is cut in its first dimension
            own = bits[low // 8 : high // 8]
        else:
            some = unpack(bits[low // 8 : -(-high // 8)], (-(-high // 8) * 8 - low // 8 * 8,))
            dense = torch.zeros(size, dtype=torch.bool, device=bits.device)
            indices = part.flat_indices(torch.arange(low, high, device=bits.device)) - begin
            dense[indices] = some[low % 8 :][: high - low]
            own = pack(dense)
        chunk.copy_(split.sum(own))
    return PackedMask(tensor.shape, whole)
