"""Turns the optimizer's parameters, state and options into the structs that `ops.step` takes."""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, float32, float64, strided
from torch.nn import Parameter

from ..arguments import both_betas, check_flags, check_seed, is_sharded, number, resolved
from ..ops.packed_mask import Masks, PackedMask
from ..ops.random_mask import KEEP_ALL, keep_threshold
from ..ops.step import StepKernels, Where
from ..ops.step_group import MASK_FIELDS, State, StepGroup, check_mask
from .groups import check_list
from .options import OWN_OPTIONS, check_options, check_storage
from .state import begin, has_begun, incomplete, unlike

if TYPE_CHECKING:
    from ..ops.ranks import NormOverRanks

_OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable"),  # AdamW's
    *OWN_OPTIONS,
)
_LR_DTYPES = (float32, float64)  # dtypes of a learning rate that the kernels on a GPU can read

# A row holds the entries of one parameter in a StepGroup's lists, a column is a list. These are the names of the lists,
# in a row's order.
_FIELDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "indices")
_AMSGRAD_FIELDS = (*_FIELDS, "max_exp_avg_sqs")
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
_Columns = dict[Alike, Sequence[list[Any]]]


def collect(
    param_groups: list[dict[str, Any]],
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
) -> dict[Where, list[StepGroup]]:
    """Sorts the parameters that have a gradient by who steps them.

    Args:
        param_groups: the optimizer's parameter groups.
        states: {parameter: its state}, the optimizer's state. Where a state has not begun, this call begins it.
        masks: {parameter: mask} of the child network; None without one. Where this call begins a state, it moves the
            mask to its parameter's device.
        kernels: the kernels that may step the parameters.
        undo: receives, for each parameter whose state this call begins or extends, what the state was; None for none.

    Raises:
        ValueError: an option cannot be honoured, or a group or the state of a parameter lacks an entry.
        TypeError: an option, or a group's parameters, are of a kind that no step can take.
        BackendError: there are no kernels for a GPU, and they were asked for.
    """
    by_where: defaultdict[Where, list[StepGroup]] = defaultdict(list)
    reader, first = kernels.state_reader(states, masks), 0
    clips = any(group.get("max_grad_norm") is not None for group in param_groups)
    for group in param_groups:
        try:
            check_flags(group)
            fields = _AMSGRAD_FIELDS if group["amsgrad"] else _FIELDS
            params, state, rounding = group["params"], group["state"], group["rounding"]
            if type(params) is not list:
                check_list(params)
        except KeyError as error:
            raise incomplete(error) from error
        read = None
        if reader is not None and state == "float32" and rounding == "nearest":
            read = reader.read(params, first, fields is _AMSGRAD_FIELDS)
        if read is not None:
            columns = _usual_columns(kernels.on_cpu, *read)
        else:
            columns = _unusual_columns(group, first, fields, states, masks, kernels, undo, clips)
        first += len(params)
        for alike, of_kind in columns.items():
            if of_kind[0]:
                target = _options(group, param_groups[0], masks is not None, alike.where)
                target.state, target.stochastic = alike.state, alike.stochastic
                _check_capturable(target, alike.where, kernels, of_kind[0][0])
                for field, column in zip(fields + alike.own_fields, of_kind, strict=True):
                    setattr(target, field, column)
                by_where[alike.where].append(target)
    return by_where


def _unusual_columns(
    group: dict[str, Any],
    first: int,
    fields: tuple[str, ...],
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
    clips: bool,
) -> _Columns:
    """Returns the columns of a group of any parameters; `clips` says whether any group has max_grad_norm."""
    amsgrad, params = fields is _AMSGRAD_FIELDS, group["params"]
    rows: Rows = defaultdict(list)
    if group["state"] == "float32" and group["rounding"] == "nearest":
        reserve_p = group.get("reserve_p")
        ordered = clips or masks is not None or not isinstance(reserve_p, (int, float)) or reserve_p != 1
        sharded = _add_rows(rows, params, first, fields, states, masks, kernels, undo, ordered)
    else:
        from .rounded import add_rounded_rows

        check_storage(group)
        ordered = True
        sharded = add_rounded_rows(rows, group, first, amsgrad, states, masks, kernels, undo)
    if sharded:
        from .sharded import add_sharded_rows  # which imports torch.distributed.tensor

        add_sharded_rows(rows, sharded, group, amsgrad, states, masks, kernels, undo, ordered)
    return {Alike(*kind): list(map(list, zip(*of_kind, strict=True))) for kind, of_kind in rows.items() if of_kind}


def _usual_columns(
    on_cpu: Where, plain: Sequence[list[Any]], masked: Sequence[list[Any]], masks: list[PackedMask]
) -> _Columns:
    """Returns the columns of a group all of whose parameters the compiled reader knows."""
    for mask, param in zip(masks, masked[0], strict=True):
        check_mask(mask, param)
    of_masks = [mask.bits for mask in masks], [mask.offsets for mask in masks], [mask.count for mask in masks]
    return {Alike(on_cpu): plain, Alike(on_cpu, MASK_FIELDS): (*masked, *of_masks)}


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
    amsgrad = fields is _AMSGRAD_FIELDS
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


def norm_over_ranks(param_groups: list[dict[str, Any]]) -> "AbstractContextManager[NormOverRanks | None]":
    """Returns the context of a step that has a norm over ranks; of None if no parameter is cut, or none has a limit."""
    if all(group.get("max_grad_norm") is None for group in param_groups):
        return contextlib.nullcontext()
    params = enumerate(itertools.chain.from_iterable(group["params"] for group in param_groups))
    cut = {i: param for i, param in params if type(param) is not Parameter and is_sharded(param)}
    if not cut:
        return contextlib.nullcontext()
    from ..ops.ranks import NormOverRanks

    return NormOverRanks(cut)


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


def _options(group: dict[str, Any], first_group: dict[str, Any], masked: bool, where: Where) -> StepGroup:
    """Returns a StepGroup of a group's options, without parameters; the first group has the optimizer's seed."""
    try:
        options = {name: group[name] for name in _OPTIONS}
        if not masked or "reserve_p" in group:  # which a user may have put there
            options["reserve_p"] = group["reserve_p"]
        seed = first_group["seed"]
    except KeyError as error:
        raise incomplete(error) from error
    check_options(options, seed)  # again, because a user may have changed them in `param_groups`
    lr, (beta1, beta2) = options["lr"], both_betas(options)
    on_its_gpu = (
        isinstance(lr, Tensor)
        and lr.is_cuda
        and lr.get_device() == where
        and lr.dtype in _LR_DTYPES
        and lr.numel() == 1
    )
    return StepGroup(
        lr=math.nan if on_its_gpu else number(options, "lr"),  # which would wait for the GPU
        lr_on_device=lr if on_its_gpu else None,
        capturable=bool(options["capturable"]),
        beta1=beta1,
        beta2=beta2,
        eps=number(options, "eps", least=0.0),
        weight_decay=number(options, "weight_decay", least=0.0),
        amsgrad=bool(options["amsgrad"]),
        grad_factor=-1.0 if options["maximize"] else 1.0,
        keep_threshold=KEEP_ALL if masked else keep_threshold(options["reserve_p"]),
        published_code=options["variant"] == "hf",
        seed=check_seed(options["seed"]),
        max_grad_norm=options["max_grad_norm"],
        decay_outside=options["decay"] == "all",
        child_norm=options["norm_of"] == "child",
    )


def _check_capturable(group: StepGroup, where: Where, kernels: StepKernels, first: Tensor) -> None:
    """Raises ValueError if a group has capturable=True, but no GPU steps its parameters, of which `first` is one."""
    if group.capturable and not isinstance(where, int):
        raise ValueError(
            "ChildAdamW: capturable=True needs parameters that the compiled kernels step on a GPU: contiguous, with "
            f"backend='auto' where the kernels have proved themselves (got one of shape {tuple(first.shape)} on "
            f"{first.device}, backend={kernels.backend!r}); use capturable=False"
        )
