"""What a step does to the shards of a DTensor that this rank holds; imported only when there is a DTensor."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..ops.packed_mask import Masks
from ..ops.shards import Piece, local_gradient, local_tensor, pieces_of
from ..ops.step import StepKernels
from ..ops.step_group import MASK_FIELDS, SCALE_FIELDS, check_mask
from .kinds import is_rounded, kind_of
from .placed import check_placed, place_of
from .state import averages_of, begun


def add_sharded_rows(
    rows: MutableMapping[Any, list[tuple[Any, ...]]],
    params: Sequence[tuple[Any, Tensor, int]],
    group: dict[str, Any],
    amsgrad: bool,
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
    ordered: bool,
) -> None:
    """Adds the rows of a group's sharded parameters; see `collect`.

    A masked shard is like a whole parameter. The random bits of another one, and those by which anything is rounded,
    depend on where its elements lie in the whole: where one slice cannot say it, the shard has several rows.

    Args:
        rows: the group's rows, by what their parameters have in common, as `rows.Alike` says.
        params: the sharded parameters (DTensor) that have a gradient, it, and their numbers in the optimizer.
        group: the group.
        amsgrad: whether it has amsgrad.
        states: the optimizer's state, as `collect` takes it.
        masks: the child network's masks, as `collect` takes them.
        kernels: the kernels that may step the parameters.
        undo: receives what the states were, as `collect` says.
        ordered: whether the step looks at elements in their logical order.

    Raises:
        ValueError, TypeError: a state lacks an entry, a gradient is no DTensor, or a parameter is placed so that it
            cannot be rounded.
    """
    rounding = group["rounding"]
    for param, whole_grad, i in params:
        grad = local_gradient(param, whole_grad)
        kind = kind_of(group["state"], param)
        if rounded := is_rounded(kind, rounding, param):
            check_placed(param, kind)
        state, mask = begun(param, states, masks, amsgrad, kind, undo)
        averages, scales = averages_of(state, kind, amsgrad, param, i)
        averages = [local_tensor(average) for average in averages]
        scales = [local_tensor(of_average).view(-1) for of_average in scales]
        row: tuple[Any, ...] = (param._local_tensor, grad, *averages[:2], state["step"], i, *averages[2:])
        tensors = [*row[:4], *row[6:], *scales]
        where = kernels.on_cpu if grad.is_cpu else kernels.elsewhere(tensors)
        own_fields, own = (*SCALE_FIELDS[: len(scales)], "sharded"), (*scales, param)
        if mask is not None:
            check_mask(mask, param)
            own_fields, own = (*own_fields, *MASK_FIELDS), (*own, mask.bits, mask.offsets, mask.count)
        made, placed = [(*row, *own)], rounded or (ordered and mask is None)
        if rounded:
            made = [(*row, *own, place_of(param))]
        elif placed:
            made = _rows_of_pieces(row, own, pieces_of(param._spec))
        own_fields = (*own_fields, "slices") if placed else own_fields
        rows[where, own_fields, kind, rounding == "stochastic" and param.element_size() == 2] += made


def _rows_of_pieces(row: tuple[Any, ...], own: tuple[Any, ...], pieces: list[Piece]) -> list[tuple[Any, ...]]:
    """Returns a row for each piece of a shard, or its own for one. Each counts a step, the first one in the state."""
    if len(pieces) == 1:
        return [(*row, *own, pieces[0][1])]
    tensors, step, i, maximum = row[:4], row[4], row[5], row[6:]
    found = []
    for index, place in pieces:
        found.append((*(t[index] for t in tensors), step, i, *(t[index] for t in maximum), *own, place))
        step = step.clone()
    return found
