"""Sharded parameters (DTensor, as FSDP2's fully_shard makes them): the local part, and where it lies in the whole.

This module is imported only when there is a DTensor, so that the package does not import torch.distributed.tensor.
"""

import math
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: Any) -> Any:
    """Returns the part of a DTensor that this rank holds, or any other object as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mask_slice(param: Tensor) -> tuple[int, int, int]:
    """Returns (offset, run, stride): which elements of the whole parameter this rank holds.

    The elements form runs of `run` elements that are consecutive in the whole parameter's flat order. The first run
    begins at `offset`, and each later run begins `stride` elements after the one before.

    Raises:
        ValueError: the parameter is sharded in another way, or holds partial sums.
    """
    if not isinstance(param, DTensor) or all(isinstance(p, Replicate) for p in param.placements):
        return 0, local_tensor(param).numel(), 0
    if any(isinstance(p, Partial) for p in param.placements):
        raise ValueError("ChildAdamW: parameters must be sharded or replicated (got a DTensor that is partial)")
    shape = tuple(param.shape)
    local, start = compute_local_shape_and_global_offset(shape, param.device_mesh, param.placements)
    if tuple(local) != tuple(param.to_local().shape):
        raise ValueError(f"ChildAdamW: cannot tell which part of a parameter this rank holds (got {param.placements})")
    split = [d for d in range(len(shape)) if local[d] != shape[d]]
    last = split[-1] if split else 0
    if len(split) > 1 and math.prod(local[:last]) > 1:
        raise ValueError(
            f"ChildAdamW: parameters sharded along several dimensions are not supported (got {param.placements}); "
            "shard along one"
        )
    stride = math.prod(shape[last:])
    offset = sum(start[d] * math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return offset, math.prod(local[last:]), stride
