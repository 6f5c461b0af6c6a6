"""The rows of a step: what of each parameter goes into a StepGroup, where the compiled reader does not read it."""

from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, strided
from torch.nn import Parameter

from ..arguments import is_sharded, resolved
from ..ops.packed_mask import Masks
from ..ops.step import StepKernels, Where
from ..ops.step_group import MASK_FIELDS, SCALE_FIELDS, State, check_mask
from .kinds import kind_of
from .state import averages_of, begin, begun, has_begun, unlike

# A row holds the entries of one parameter in a StepGroup's lists, a column is a list. These are the names of the lists,
# in a row's order.
FIELDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "indices")
AMSGRAD_FIELDS = (*FIELDS, "max_exp_avg_sqs")
_NOT_ON_DEVICE = ("steps", "indices")


class Alike(NamedTuple):
    """What parameters of a group have in common that are in one StepGroup.

    Attributes:
        where: who steps them.
        own_fields: the fields that they have beside the usual ones.
        state, stochastic: those of the StepGroup.
    """

    where: Where
    own_fields: tuple[str, ...] = ()
    state: State = "float32"
    stochastic: bool = False


# The rows of a group's parameters; the columns that they are turned into.
Rows = MutableMapping[tuple[Where, tuple[str, ...], State, bool], list[tuple[Any, ...]]]
Columns = dict[Alike, Sequence[list[Any]]]


def unusual_columns(
    group: dict[str, Any],
    first: int,
    fields: tuple[str, ...],
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
    clips: bool,
) -> Columns:
    """Returns the columns of a group of any parameters; `clips` says whether any group has max_grad_norm."""
    amsgrad, params = fields is AMSGRAD_FIELDS, group["params"]
    rows: Rows = defaultdict(list)
    if group["state"] == "float32" and group["rounding"] == "nearest":
        reserve_p = group.get("reserve_p")
        ordered = clips or masks is not None or not isinstance(reserve_p, (int, float)) or reserve_p != 1
        sharded = _add_rows(rows, params, first, fields, states, masks, kernels, undo, ordered)
    else:
        ordered = True
        sharded = _add_rounded_rows(rows, group, first, amsgrad, states, masks, kernels, undo)
    if sharded:
        from .sharded import add_sharded_rows  # which imports torch.distributed.tensor

        add_sharded_rows(rows, sharded, group, amsgrad, states, masks, kernels, undo, ordered)
    return {Alike(*kind): list(map(list, zip(*of_kind, strict=True))) for kind, of_kind in rows.items() if of_kind}


def _add_rows(
    rows: Rows,
    params: Sequence[Tensor],
    first: int,
    fields: tuple[str, ...],
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
    ordered: bool,
) -> list[tuple[Tensor, Tensor, int]]:
    """Adds the rows of a group's parameters, in which nothing is rounded stochastically.

    Sharded ones (DTensor) are left out and returned with their gradients and numbers. `ordered` says whether the step
    looks at elements in their logical order: for a mask, or for the gradients' norm.
    """
    on_cpu = kernels.on_cpu
    plain_rows = rows[Alike(on_cpu)]
    amsgrad = fields is AMSGRAD_FIELDS
    sharded: list[tuple[Tensor, Tensor, int]] = []
    for i, param in enumerate(params, first):
        grad = param.grad
        if grad is None:
            continue
        if type(param) is not Parameter and is_sharded(param):
            sharded.append((param, grad, i))
            continue
        if grad.is_neg():
            grad = resolved(grad)
        state = states.get(param)
        mask = masks.get(param) if masks else None
        # The first tests save most calls.
        if state is None or ((amsgrad or "exp_avg" not in state) and not has_begun(state, amsgrad)):
            undo.setdefault(param, dict(states[param]) if param in states else None)
            state = states[param]
            mask = begin(state, param, masks, amsgrad)
        try:
            row: tuple[Any, ...] = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], i)
            if amsgrad:
                row = (*row, state["max_exp_avg_sq"])
        except KeyError as error:
            raise unlike(error, state, "float32", param, i) from error
        if param.is_cpu:
            where = on_cpu
        else:
            row = row if ordered else _in_memory_order(fields, row)
            where = _elsewhere(kernels, fields, row)
        if mask is not None:
            check_mask(mask, param)
            rows[Alike(where, MASK_FIELDS)].append((*row, mask.bits, mask.offsets, mask.count))
        else:  # mostly on the CPU, where a step may take under 1 us for each
            (plain_rows if where == on_cpu else rows[Alike(where)]).append(row)
    return sharded


def _add_rounded_rows(
    rows: MutableMapping[Any, list[tuple[Any, ...]]],
    group: dict[str, Any],
    first: int,
    amsgrad: bool,
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
) -> list[tuple[Tensor, Tensor, int]]:
    """Adds the rows of the parameters of a group with other `state` or `rounding` than the usual; see `collect`.

    Its small parameters, and those of 32 bits, may be usual ones. They have rows of their own. Sharded ones (DTensor)
    are left out and returned with their gradients and numbers.

    Raises:
        ValueError: a parameter is float64, or its state lacks an entry or is stored in another way.
    """
    sharded: list[tuple[Tensor, Tensor, int]] = []
    for i, param in enumerate(group["params"], first):
        grad = param.grad
        if grad is None:
            continue
        if type(param) is not Parameter and is_sharded(param):
            sharded.append((param, grad, i))
            continue
        grad = resolved(grad)
        kind = kind_of(group["state"], param)
        state, mask = begun(param, states, masks, amsgrad, kind, undo)
        averages, scales = averages_of(state, kind, amsgrad, param, i)
        row = (param, grad, *averages[:2], state["step"], i, *averages[2:], *scales)
        own_fields = SCALE_FIELDS[: len(scales)]
        if mask is not None:
            check_mask(mask, param)
            row = (*row, mask.bits, mask.offsets, mask.count)
            own_fields += MASK_FIELDS
        where = kernels.on_cpu if param.is_cpu else kernels.elsewhere([param, grad, *averages, *scales])
        rows[where, own_fields, kind, group["rounding"] == "stochastic" and param.element_size() == 2].append(row)
    return sharded


def _in_memory_order(fields: tuple[str, ...], row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a row with its tensors as contiguous views, if they lie densely in memory in one order of dimensions.

    So do those of channels_last. An update without mask is the same for every element, whatever its place; and the
    kernels on a GPU take only contiguous tensors.
    """
    param = row[0]
    if param.is_contiguous():  # the usual case
        return row
    tensors = [entry for field, entry in zip(fields, row, strict=True) if field not in _NOT_ON_DEVICE]
    if any(tensor.layout != strided for tensor in tensors):
        return row
    order = sorted(range(param.dim()), key=lambda dim: -param.stride(dim))
    if any(tensor.shape != param.shape or not tensor.permute(order).is_contiguous() for tensor in tensors):
        return row
    views = {id(tensor): tensor.permute(order) for tensor in tensors}
    return tuple(views.get(id(entry), entry) for entry in row)


def _elsewhere(kernels: StepKernels, fields: tuple[str, ...], row: tuple[Any, ...]) -> Where:
    """Returns who steps the parameter of a row, which is not on the CPU."""
    return kernels.elsewhere([entry for field, entry in zip(fields, row, strict=True) if field not in _NOT_ON_DEVICE])
