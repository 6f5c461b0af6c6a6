"""What a step does to the shards of a DTensor that this rank holds; imported only when there is a DTensor."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..ops.packed_mask import Masks
from ..ops.shards import Piece, local_gradient, local_tensor, pieces_of
from ..ops.step import StepKernels, Where
from ..ops.step_group import MASK_FIELDS, check_mask
from .state import begin, has_begun, incomplete

# The fields that a row has beside the usual ones.
_SHARDED = ("sharded",)
_PLACED = (*_SHARDED, "slices")
_MASKED = (*_SHARDED, *MASK_FIELDS)


def add_rows(
    rows: MutableMapping[tuple[Where, tuple[str, ...]], list[tuple[Any, ...]]],
    params: Sequence[tuple[Any, Tensor, int]],
    amsgrad: bool,
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
    ordered: bool,
) -> None:
    """Adds the rows of a group's sharded parameters; see `collect`.

    A masked shard is like a whole parameter. The random mask of another one depends on where its elements lie in the
    whole: where one slice cannot say it, the shard has several rows.

    Args:
        rows: the group's rows, by who steps them and which fields they have beside the usual ones.
        params: the sharded parameters (DTensor) that have a gradient, it, and their numbers in the optimizer.
        amsgrad: whether the group has amsgrad.
        states: the optimizer's state, as `collect` takes it.
        masks: the child network's masks, as `collect` takes them.
        kernels: the kernels that may step the parameters.
        undo: receives what the states were, as `collect` says.
        ordered: whether the step looks at elements in their logical order.

    Raises:
        ValueError, TypeError: a state lacks an entry, or a gradient is no DTensor.
    """
    on_cpu = kernels.on_cpu
    placed_rows = rows[on_cpu, _PLACED]
    for param, whole_grad, i in params:
        grad = local_gradient(param, whole_grad)
        state = states.get(param)
        mask = masks.get(param) if masks else None
        if state is None or ((amsgrad or "exp_avg" not in state) and not has_begun(state, amsgrad)):
            undo.setdefault(param, dict(states[param]) if param in states else None)
            state = states[param]
            mask = begin(state, param, masks, amsgrad)
        try:
            exp_avg, exp_avg_sq = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
            row: tuple[Any, ...] = (param._local_tensor, grad, exp_avg, exp_avg_sq, state["step"], i)
            if amsgrad:
                row = (*row, local_tensor(state["max_exp_avg_sq"]))
        except KeyError as error:
            raise incomplete(error) from error
        where = on_cpu if grad.is_cpu else kernels.elsewhere([*row[:4], *row[6:]])
        if mask is not None:
            check_mask(mask, param)
            rows[where, _MASKED].append((*row, param, mask.bits, mask.offsets, mask.count))
        elif not ordered:
            rows[where, _SHARDED].append((*row, param))
        elif len(pieces := pieces_of(param._spec)) == 1:
            (placed_rows if where == on_cpu else rows[where, _PLACED]).append((*row, param, pieces[0][1]))
        else:
            rows[where, _PLACED] += _rows_of_pieces(row, param, pieces)


def _rows_of_pieces(row: tuple[Any, ...], param: Any, pieces: list[Piece]) -> list[tuple[Any, ...]]:
    """Returns a row for each piece of a shard. Each counts a step, the first one in the state."""
    tensors, step, i, maximum = row[:4], row[4], row[5], row[6:]
    found = []
    for index, place in pieces:
        found.append((*(t[index] for t in tensors), step, i, *(t[index] for t in maximum), param, place))
        step = step.clone()
    return found
