"""State of fewer bits where parameters are sharded: which placements it needs, and its scales as DTensors.

The scales of a DTensor's 8-bit state are a DTensor of shape [rows, scales in a row] that is placed as the parameter, so
that whatever cuts or gathers the one does so with the other. Imported only when there is a DTensor.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ..ops.codes import block_count
from ..ops.random_mask import BLOCK
from ..ops.shards import local_tensor, pieces_of, whole_tensor
from ..ops.step_group import State


def check_placed(param: DTensor, kind: State) -> None:
    """Raises ValueError unless steps can round what each rank holds of a parameter, and its state.

    The random bits of 128 neighbouring elements are drawn together, so that every rank's part must be one run of
    elements that begins at a multiple of 128. In 8-bit state these have one scale, so that a row, which is what
    placements cut, must be a multiple of 128 too. What is asked for does not depend on the rank, so that all raise.
    """
    rows, row = _rows_of(param)
    chunk, strided, ranks = rows, False, 1
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if size == 1 or not isinstance(placement, (Shard, _StridedShard)):
            continue
        if placement.dim != 0:
            raise _refused(param, kind, "no other dimension than the first may be cut")
        chunk, ranks = -(-chunk // size), ranks * size
        strided = strided or isinstance(placement, _StridedShard)
    if strided and rows % ranks:
        raise _refused(param, kind, f"the first dimension must be a multiple of the {ranks} ranks that cut it")
    if (kind == "8bit" and row % BLOCK) or (ranks > 1 and chunk * row % BLOCK):
        what = "a row" if kind == "8bit" else "what each rank holds"
        raise _refused(param, kind, f"{what} must be a multiple of {BLOCK} elements")


def _rows_of(param: Tensor) -> tuple[int, int]:
    """Returns how many rows a parameter has, those of its first dimension, and how many elements are in one."""
    return (param.shape[0] if param.dim() else 1), math.prod(param.shape[1:])


def _refused(param: DTensor, kind: State, required: str) -> ValueError:
    what = f"state={kind!r}" if kind != "float32" else "rounding='stochastic'"
    return ValueError(
        f"ChildAdamW: for {what} of a DTensor, {required} (got shape {tuple(param.shape)}, placed as "
        f"{tuple(param.placements)} on {param.device_mesh.size()} ranks); give it a group with state='float32' and "
        "rounding='nearest'"
    )


def place_of(param: DTensor) -> tuple[int, int, int]:
    """Returns the slice that this rank holds of a parameter for which `check_placed` does not raise."""
    return pieces_of(param._spec)[0][1]


def scales_like(local: Tensor, param: DTensor) -> DTensor:
    """Returns the scales of a DTensor's state as one, of which this rank holds `local`, flat."""
    rows, row = _rows_of(param)
    in_a_row = row // BLOCK
    meta = TensorMeta(torch.Size((rows, in_a_row)), (in_a_row, 1), local.dtype)
    spec = DTensorSpec(param.device_mesh, param.placements, meta)
    return DTensor(local.view(-1, in_a_row), spec, requires_grad=False)


def local_scales(scales: Tensor, param: DTensor) -> Tensor:
    """Returns this rank's part, flat, of the scales of a parameter's state, be they whole or cut in any way.

    All ranks of a DTensor's mesh must come here, for it may be gathered.
    """
    placed = (param.device_mesh, param.placements)
    if isinstance(scales, DTensor) and (scales.device_mesh, scales.placements) == placed:
        return local_tensor(scales).reshape(-1)
    first = place_of(param)[0] // BLOCK
    return whole_tensor(scales).reshape(-1)[first : first + block_count(local_tensor(param).numel())]
