"""Sums over the ranks that hold parts of the same DTensor; as few collectives as there are ways to be cut.

This module is imported only when there is a DTensor, as shards.py is.
"""

import functools
from collections.abc import Hashable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

_Key = TypeVar("_Key", bound=Hashable)


class Split(NamedTuple):
    """The ranks among which a DTensor is cut.

    Attributes:
        mesh: the mesh that it lies on.
        dims: the dimensions of the mesh that cut it; along the others, ranks hold copies.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]

    @staticmethod
    def of(tensor: DTensor) -> "Split":
        """Returns the ranks among which a DTensor is cut; in a step's time, for it is remembered."""
        return _split_of(tensor._spec)

    def sum(self, numbers: Tensor) -> Tensor:
        """Returns the sum of tensors over the ranks, on the device of this rank's, with the same bits on every rank.

        Integers are added as they come, other numbers in the order of the ranks.
        """
        total = numbers.to(self.mesh.device_type)
        for dim in self.dims:
            group = self.mesh.get_group(dim)
            if not total.is_floating_point():
                total = total.clone()
                dist.all_reduce(total, group=group)
                continue
            parts = [torch.empty_like(total) for _ in range(self.mesh.size(dim))]
            dist.all_gather(parts, total.contiguous(), group=group)
            total = parts[0]
            for part in parts[1:]:
                total += part
        return total.to(numbers.device)


@functools.lru_cache(maxsize=1 << 16)
def _split_of(spec: Any) -> Split:
    cut = (dim for dim, placement in enumerate(spec.placements) if not isinstance(placement, Replicate))
    return Split(spec.mesh, tuple(cut))


def splits(tensors: Mapping[_Key, DTensor]) -> dict[Split, list[_Key]]:
    """Returns which DTensors are cut among the same ranks, in one order on all of them."""
    found: dict[Split, list[_Key]] = {}
    for key, tensor in tensors.items():
        found.setdefault(Split.of(tensor), []).append(key)
    return found


class NormOverRanks:
    """Adds up, in one step, the squares of the gradients of parameters that are cut over ranks.

    Every rank must enter it, so that none waits for one that has raised: as a context, it tells the others of an error
    that comes before the sum, and they raise too.
    """

    def __init__(self, params: Mapping[int, DTensor]) -> None:
        """Takes {number: parameter}, the same on all ranks, with those that have no gradient on this one."""
        self._params = params
        self._joined = False

    def add(self, own: MutableMapping[int, float], skip: bool, failed: bool = False) -> bool:
        """Adds up sums of squares, in place; the results have the same bits on every rank.

        Args:
            own: {number of a parameter: this rank's sum}; one that is missing is 0.
            skip: whether this rank asks for the step to be skipped.
            failed: whether this rank has raised (default: False).

        Returns:
            Whether one of the ranks asks for the step to be skipped.

        Raises:
            RuntimeError: another rank has raised.
        """
        self._joined = True
        others_failed = False
        for split, keys in splits(self._params).items():
            told = [float(skip), float(failed)]
            numbers = torch.tensor([*told, *(own.get(key, 0.0) for key in keys)], dtype=torch.float64, device="cpu")
            skips, failures, *sums = split.sum(numbers).tolist()
            skip, others_failed = skip or skips > 0, others_failed or failures > 0
            own.update(zip(keys, sums, strict=True))
        if others_failed and not failed:
            raise RuntimeError("ChildAdamW: all ranks must take a step together (another one raised); look there")
        return skip

    def __enter__(self) -> "NormOverRanks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not self._joined:
            self.add({}, skip=False, failed=True)


def worst(number: int, meshes: Iterable[DeviceMesh]) -> int:
    """Returns the greatest of the ranks' numbers, over all ranks of all meshes; every one of them must come here."""
    for mesh in dict.fromkeys(meshes):
        found = torch.tensor(number, device=mesh.device_type)  # an int64
        for dim in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        number = int(found)
    return number


def told(message: Any, meshes: Iterable[DeviceMesh]) -> Any:
    """Returns one of the ranks' messages that is not None; all ranks of all meshes must come here."""
    for mesh in dict.fromkeys(meshes):
        for dim in range(mesh.ndim):
            found: list[Any] = [None] * mesh.size(dim)
            dist.all_gather_object(found, message, group=mesh.get_group(dim))
            message = next((one for one in found if one is not None), None)
    return message
