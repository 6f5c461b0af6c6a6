"""Adds the sums of data-parallel ranks, each of which has squared the gradients of its own part of the data."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sums import SquareSums

_WHAT = "FisherAccumulator.all_reduce: "


class _Part(NamedTuple):
    """What ranks tell each other before they add their sums."""

    weight: float
    damaged: bool
    sharded: bool
    grad_clip: float | None
    shapes: dict[str, tuple[int, ...]]


def add_over_ranks(sums: SquareSums, group: "dist.ProcessGroup | None") -> None:
    """Replaces sums and weight by the ranks' total; see `FisherAccumulator.all_reduce`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{_WHAT}the ranks must be in a process group (there is none); call torch.distributed.init_process_group() "
            "first, or leave all_reduce() out if there is one process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{_WHAT}the rank must be in the group (this one is not); call it on the group's ranks only")
    shapes = {name: tuple(tensor.shape) for name, tensor in sums.sums.items()}
    here = _Part(sums.weight, sums.damaged, bool(sums.sharded), sums.grad_clip, shapes)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, here, group=group)
    for rank, part in enumerate(parts):
        _check_part(part, parts[0], rank)
    with sums.adding():
        for tensor in sums.sums.values():
            total = tensor.to(_device_for(tensor, group))
            dist.all_reduce(total, group=group)  # with the same bits on every rank
            tensor.copy_(total)
        sums.weight = sum(part.weight for part in parts)


def _check_part(part: _Part, first: _Part, rank: int) -> None:
    """Raises ValueError, which is the same on every rank, unless a rank's sums can be added to the first one's."""
    if part.sharded:
        raise ValueError(
            f"{_WHAT}parameters must be whole (got sharded ones on rank {rank}, whose gradients have been reduced over "
            "the ranks already); leave all_reduce() out"
        )
    if part.damaged:
        raise ValueError(
            f"{_WHAT}the sums must be whole (those of rank {rank} hold a part of a gradient that was not finite, or of "
            "an addition that did not come to its end); call reset() there and begin anew"
        )
    if part.shapes != first.shapes:
        wrong = min(name for name, _ in part.shapes.items() ^ first.shapes.items())
        raise ValueError(
            f"{_WHAT}all ranks must score the same parameters (got '{wrong}' of shape {first.shapes.get(wrong)} on "
            f"rank 0, {part.shapes.get(wrong)} on rank {rank}); use the same model and `names` everywhere"
        )
    if part.grad_clip != first.grad_clip:
        raise ValueError(
            f"{_WHAT}all ranks must have one grad_clip (got {first.grad_clip} on rank 0, {part.grad_clip} on rank "
            f"{rank})"
        )


def _device_for(tensor: Tensor, group: "dist.ProcessGroup | None") -> torch.device:
    """Returns a device from which the group can send a tensor: its own, unless NCCL would have to send from the CPU."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return tensor.device if tensor.device.type in kinds else torch.device(kinds[0])
