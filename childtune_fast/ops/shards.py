"""Sharded parameters (DTensor, as FSDP2 and tensor parallelism make them): which part of the whole a rank holds.

This module is imported only when there is a DTensor, so that the package does not import torch.distributed.tensor.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from ..arguments import resolved
from .packed_mask import PackedMask

Run = tuple[int, int]  # (first index, length) of neighbouring indices
Piece = tuple[tuple[int | slice, ...] | None, tuple[int, int, int]]


class LocalPart(NamedTuple):
    """Which elements of a whole tensor a rank holds: in each dimension, those of some runs of indices.

    Attributes:
        whole: the shape of the whole tensor.
        runs: for each dimension its runs; a dimension that is not cut has one.
    """

    whole: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the rank holds."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    def cut(self, whole: Tensor) -> Tensor:
        """Returns the rank's part of a whole tensor; a view of it unless a dimension has several runs."""
        for dim, runs in enumerate(self.runs):
            parts = [whole.narrow(dim, *run) for run in runs]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return whole

    def flat_indices(self, positions: Tensor) -> Tensor:
        """Returns the flat indices in the whole tensor of elements, given their flat positions in the part; int64."""
        found = torch.zeros_like(positions)
        for dim, runs in enumerate(self.runs):
            place = positions // math.prod(self.shape[dim + 1 :]) % self.shape[dim]
            ends = list(itertools.accumulate(length for _, length in runs))
            shifts = [first + length - end for (first, length), end in zip(runs, ends, strict=True)]
            table = torch.tensor([ends, shifts], device=positions.device)
            place += table[1][torch.searchsorted(table[0], place, right=True)]
            found += place.mul_(math.prod(self.whole[dim + 1 :]))
        return found

    def position(self, index: int) -> int:
        """Returns how many elements of the part lie before a flat index in the whole tensor."""
        if index >= math.prod(self.whole):
            return math.prod(self.shape)
        before = 0
        for dim, runs in enumerate(self.runs):
            place, index = divmod(index, math.prod(self.whole[dim + 1 :]))
            lower = sum(min(max(place - first, 0), length) for first, length in runs)
            before += lower * math.prod(self.shape[dim + 1 :])
            if not any(first <= place < first + length for first, length in runs):
                break
        return before

    def pieces(self) -> list[Piece]:
        """Returns the part in pieces that a step can take, each as (its index in the part, its slice).

        A slice is (offset, run, stride): the piece's elements form runs of `run` elements that are consecutive in the
        whole tensor's flat order. The first run begins at `offset`, and each later one `stride` elements after the one
        before. The index is None for a part of one piece, as nearly all are. It takes several if the tensor is cut in
        two dimensions behind another one, or if a dimension has several runs.
        """
        if math.prod(self.shape) == 0:
            return [(None, (0, 0, 0))]
        pieces = list(itertools.chain.from_iterable(map(self._pieces_of_box, _boxes(self.runs))))
        return [(None, pieces[0][1])] if len(pieces) == 1 else pieces

    def _pieces_of_box(self, box: tuple[tuple[int, Run], ...]) -> Iterator[Piece]:
        """Yields the pieces of a box: for each dimension, the index in the part where a run begins, and the run."""
        sizes = [length for _, (_, length) in box]
        strides = [math.prod(self.whole[dim + 1 :]) for dim in range(len(box))]
        cut = [dim for dim, size in enumerate(sizes) if size != self.whole[dim]]
        last = cut[-1] if cut else 0
        # In the dimensions from `outer` to before `last`, neighbours lie at one distance; those before are enumerated.
        outer = next((dim for dim in reversed(cut[:-1]) if math.prod(sizes[:dim]) > 1), 0)
        slices = [slice(begin, begin + length) for begin, (_, length) in box[outer:]]
        for lead in itertools.product(*map(range, sizes[:outer])):
            index = [begin + i for i, (begin, _) in zip(lead, box, strict=False)]
            places = [*lead, *[0] * (len(box) - outer)]
            offset = sum((first + i) * stride for i, (_, (first, _)), stride in zip(places, box, strides, strict=True))
            yield (*index, *slices), (offset, math.prod(sizes[last:]), math.prod(self.whole[last:]))


def _boxes(runs: tuple[tuple[Run, ...], ...]) -> Iterator[tuple[tuple[int, Run], ...]]:
    """Yields each choice of one run from every dimension, the run with its place in the part."""
    placed = []
    for of_dim in runs:
        ends = itertools.accumulate(length for _, length in of_dim)
        placed.append([(end - run[1], run) for end, run in zip(ends, of_dim, strict=True)])
    return itertools.product(*placed)


# ---- What a rank holds of a DTensor --------------------------------------------------------------------------------


def local_part(tensor: DTensor) -> LocalPart:
    """Returns which elements of a DTensor this rank holds.

    Raises:
        ValueError: the DTensor holds partial sums, is placed in a way that is not known, or on a mesh without this
            rank.
    """
    return _local_part(tuple(tensor.shape), tensor.device_mesh, tuple(tensor.placements))


@functools.lru_cache(maxsize=1 << 16)
def pieces_of(spec: Any) -> list[Piece]:
    """Returns `LocalPart.pieces` of the DTensors that have this `_spec`, by whose own hash they are remembered."""
    return _local_part(tuple(spec.shape), spec.mesh, tuple(spec.placements)).pieces()


@functools.lru_cache(maxsize=1 << 16)
def _local_part(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> LocalPart:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"a DTensor's mesh must have this rank in it (got {mesh})")
    runs: list[tuple[Run, ...]] = [((0, size),) for size in shape]
    for place, size, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if isinstance(placement, (Shard, _StridedShard)):
            dim, factor = placement.dim, getattr(placement, "split_factor", 1)
            pieces = [_chunk(piece, size, place) for piece in _chunks(runs[dim], factor)]
            runs[dim] = _merged([run for piece in pieces for run in piece])
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"a DTensor parameter must be sharded or replicated (got one that is placed as {placement}); "
                "redistribute it before anything is made for it"
            )
    return LocalPart(shape, tuple(runs))


def _chunks(runs: tuple[Run, ...], count: int) -> list[tuple[Run, ...]]:
    return [_chunk(runs, count, number) for number in range(count)]


def _chunk(runs: tuple[Run, ...], count: int, number: int) -> tuple[Run, ...]:
    """Returns chunk `number` of `count` of a dimension, as torch.chunk cuts it; empty if there are fewer chunks."""
    size = -(-sum(length for _, length in runs) // count)
    begin, end = number * size, (number + 1) * size
    found, at = [], 0
    for first, length in runs:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            found.append((first + low - at, high - low))
        at += length
    return tuple(found) or ((0, 0),)


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Returns runs without empty ones, neighbours joined; one empty run if there is no element."""
    found: list[Run] = []
    for first, length in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + length)
        elif length:
            found.append((first, length))
    return tuple(found) or ((0, 0),)


def local_tensor(tensor: Any) -> Any:
    """Returns what this rank holds of a DTensor, without a graph and of the same memory; any other object as it is."""
    # to_local() makes a view where a parameter holds a plain tensor, which takes 1 us.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_gradient(param: DTensor, grad: Tensor) -> Tensor:
    """Returns what this rank holds of a parameter's gradient, placed as the parameter.

    A gradient that is placed otherwise, such as partial sums under sequence parallelism, is redistributed: all ranks of
    the mesh must come here.

    Raises:
        TypeError: the gradient is no DTensor.
    """
    if not isinstance(grad, DTensor):
        raise TypeError(
            f"the gradient of a DTensor must be one too (got {type(grad).__name__} for a parameter of "
            f"shape {tuple(param.shape)}); make it with distribute_tensor or DTensor.from_local"
        )
    if grad._spec is not param._spec and grad.placements != param.placements:
        with torch.no_grad():
            grad = grad.redistribute(param.device_mesh, param.placements)
    local = grad._local_tensor
    # The values of a tensor that waits are still on their way.
    return resolved(local.wait() if type(local) is not Tensor and hasattr(local, "wait") else local)


def dtensor_like(local: Tensor, param: DTensor) -> DTensor:
    """Returns a DTensor of a parameter's shape and placements, of which this rank holds `local`, wherever that lies.

    Under FSDP2's CPU offload that is the CPU's memory, though the mesh is of GPUs.
    """
    strides = tuple(math.prod(param.shape[dim + 1 :]) for dim in range(param.dim()))
    spec = DTensorSpec(param.device_mesh, param.placements, TensorMeta(param.shape, strides, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # from_local would move it to the device of the mesh


def local_values(values: Tensor, param: DTensor) -> Tensor:
    """Returns what this rank needs of a tensor of a parameter's shape, be it whole or a DTensor that is cut in any way.

    All ranks of a DTensor's mesh must come here, for it may be gathered.
    """
    if isinstance(values, DTensor):
        if values.device_mesh == param.device_mesh and values.placements == param.placements:
            return local_tensor(values)
        values = whole_tensor(values)
    return local_part(param).cut(values)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns all of a DTensor, for which all ranks of its mesh must come here; any other tensor as it is.

    It is gathered on the device of the mesh: a process group of NCCL alone sends nothing from the CPU, where a
    checkpoint or FSDP2's CPU offload may have put it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    there: Any = tensor if tensor.device.type == kind else tensor.to(kind)
    return there.full_tensor()


# ---- Masks ---------------------------------------------------------------------------------------------------------


class LocalMask(PackedMask):
    """What a rank needs of the mask of a sharded parameter. Its shape, count and offsets are those of the rank's part.

    Attributes:
        part: which elements of the parameter they are.
    """

    def __init__(self, part: LocalPart, bits: Tensor, whole_digest: bytes, whole_count: int) -> None:
        """Makes it from its bits; see `of`."""
        super().__init__(part.shape, bits)
        self.part = part
        self._whole_digest, self._whole_count = whole_digest, whole_count

    @classmethod
    def of(cls, mask: PackedMask, param: DTensor) -> "LocalMask":
        """Returns this rank's part of a sharded parameter's mask, on the device of the rank's values.

        Raises:
            ValueError: the mask is already a part, but another one.
        """
        part, device = local_part(param), local_tensor(param).device
        if isinstance(mask, cls):
            if mask.part != part:
                raise ValueError(
                    "ChildAdamW: a masked parameter must stay sharded as it was when the optimizer got its mask (got "
                    f"{tuple(param.placements)} for one of shape {tuple(param.shape)}); load a checkpoint into a new "
                    "optimizer to shard it otherwise"
                )
            return mask.to(device)
        local = PackedMask.pack(part.cut(mask.unpack()))
        return cls(part, local.bits.to(device), mask.digest, mask.count)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of shape and bits of the whole mask."""
        self.bits  # noqa: B018 - raises if they have been written to
        return self._whole_digest

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self.part.whole

    @property
    def whole_count(self) -> int:
        """The number of weights in the child network, on all ranks."""
        return self._whole_count

    def __getstate__(self) -> dict[str, Any]:
        of_whole = {"whole_digest": self._whole_digest, "whole_count": self._whole_count}
        return {"part": self.part, "bits": self.bits, **of_whole}

    def to(self, device: torch.device) -> "LocalMask":
        """Returns the mask on `device`: this object if it is on it already or the device has no memory, else a copy."""
        if self.bits.device == device or device.type == "meta":
            return self
        return LocalMask(self.part, self.bits.to(device), self._whole_digest, self._whole_count)
