"""What is to be stepped: the optimizer's parameters and options, turned into the structs that the backends take."""

import itertools
import math
import operator
from collections import defaultdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _gpu, fallback
from .checks import check_mask, check_options
from .mask import KEEP_ALL, check_seed, keep_threshold
from .packed_mask import Masks, PackedMask
from .state import has_begun, init_state
from .step_group import StepGroup

Server = str | int | None  # "cpu": the compiled kernels; a GPU's number: the kernels there; None: the fallback
PLAIN_TENSORS = (Parameter, Tensor)  # any other class may be a DTensor
_LR_DTYPES = (torch.float32, torch.float64)  # that kernels read


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return type(param) not in PLAIN_TENSORS and hasattr(param, "placements")


def collect(
    optimizer: torch.optim.Optimizer, use_native: bool, use_gpus: bool, states_before: dict[Tensor, dict[str, Any]]
) -> tuple[list[StepGroup], dict[int, list[StepGroup]], list[StepGroup]]:
    """Sorts the parameters that have a gradient by who steps them.

    Args:
        optimizer: a ChildAdamW.
        use_native: whether there are compiled kernels; they take what lies on the CPU.
        use_gpus: whether kernels on GPUs are asked for.
        states_before: receives, for each parameter whose state this call begins or extends, what it was.

    Returns:
        What the CPU's kernels take, what the kernels of each GPU take, by its number, and what is left to the fallback.

    Raises:
        KeyError: a group or the state of a parameter lacks an entry.
        ValueError: an option that cannot be honoured.
        BackendError: there are no kernels for a GPU.
    """
    by_server: defaultdict[Server, list[StepGroup]] = defaultdict(list)
    states, masks = optimizer.state, optimizer.child_masks
    index = itertools.count()
    for group in optimizer.param_groups:
        amsgrad = group["amsgrad"]
        rows = defaultdict(list)  # (server, sharded, masked): what a StepGroup's lists hold of each parameter
        plain_rows: list[tuple[Any, ...]] = rows["cpu", False, False]
        for param, i in zip(group["params"], index):  # noqa: B905 - `index` is endless
            grad = param.grad
            if grad is None:
                continue
            if grad.is_neg():  # a lazily negated view, whose memory holds the opposite
                grad = grad.resolve_neg()
            state = states[param]
            mask = masks.get(param) if masks else None
            if (amsgrad or "exp_avg" not in state) and not has_begun(state, amsgrad):  # mostly without the call
                states_before[param] = dict(state)
                mask = _begin(state, param, masks, amsgrad)
            row = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], i)
            if amsgrad:
                row = (*row, state["max_exp_avg_sq"])
            if mask is not None:
                check_mask(mask, param)
                of_mask = (mask.bits, mask.offsets, mask.count)
                rows[_server(row, use_native, use_gpus), False, True].append((*row, *of_mask))
            elif type(param) is Parameter and use_native and param.is_cpu:  # mostly; a step has 2 us per parameter
                plain_rows.append(row)
            else:
                rows[_server(row, use_native, use_gpus), is_sharded(param), False].append(row)
        for (server, *kind), of_kind in filter(operator.itemgetter(1), rows.items()):
            by_server[server].append(_step_group(group, optimizer, of_kind, server, *kind))
    on_native, on_torch = by_server.pop("cpu", []), by_server.pop(None, [])
    return on_native, by_server, on_torch


def _begin(state: dict[str, Any], param: Tensor, masks: Masks, amsgrad: bool) -> PackedMask | None:
    """Begins or extends a parameter's state; returns its mask, where the parameter is now: the model may have moved."""
    mask = masks.get(param)
    if mask is not None:
        mask = masks[param] = mask.to(param.device)
    init_state(state, param, mask, amsgrad)
    return mask


def _server(row: tuple[Any, ...], use_native: bool, use_gpus: bool) -> Server:
    """Who steps a parameter."""
    param = row[0]
    if param.is_cpu:
        return "cpu" if use_native else None
    if not (use_gpus and param.is_cuda):
        return None
    _gpu.kernels_of(param.device.index)  # before anything is written
    arrays = [entry for i, entry in enumerate(row) if i not in (4, 5)]  # without step count and index
    if is_sharded(param):
        from .sharding import local_tensor

        arrays = [local_tensor(entry) for entry in arrays]
    return param.device.index if all(array.is_contiguous() for array in arrays) else None


def _step_group(
    group: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    rows: list[tuple[Any, ...]],
    server: Server,
    sharded: bool,
    masked: bool,
) -> StepGroup:
    """Turns the rows of `collect` into columns, DTensors into what this rank holds of them."""
    if group["capturable"] and not isinstance(server, int):
        raise ValueError(
            "ChildAdamW: capturable=True needs parameters that the compiled kernels step on a GPU: contiguous, with "
            f"backend='native' (got one of shape {tuple(rows[0][0].shape)} on {rows[0][0].device}, "
            f"backend={optimizer.backend!r}); use capturable=False"
        )
    target = _empty_step_group(group, optimizer, server)
    if sharded:
        from .sharding import local_tensor, mask_slice

        target.slices = [mask_slice(row[0]) for row in rows]
        rows = [tuple(local_tensor(entry) for entry in row) for row in rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    if masked:
        target.child_counts = columns.pop()
        target.child_offsets = columns.pop()
        target.child_bits = columns.pop()
    target.params, target.grads, target.exp_avgs, target.exp_avg_sqs, target.steps, target.indices = columns[:6]
    if len(columns) > 6:
        target.max_exp_avg_sqs = columns[6]
    return target


def _empty_step_group(group: dict[str, Any], optimizer: torch.optim.Optimizer, server: Server) -> StepGroup:
    check_options(group, optimizer.seed)  # options may have been changed since they were given
    lr = group["lr"]
    on_its_gpu = isinstance(lr, Tensor) and lr.is_cuda and lr.get_device() == server and lr.dtype in _LR_DTYPES
    return StepGroup(
        lr=math.nan if on_its_gpu else float(lr),  # which would wait for a GPU
        lr_on_device=lr if on_its_gpu else None,
        capturable=bool(group["capturable"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        grad_factor=-1.0 if group["maximize"] else 1.0,
        # With a child network there are no random masks, whatever a checkpoint or an editor put into the group.
        keep_threshold=KEEP_ALL if optimizer.child_masks else keep_threshold(group["reserve_p"]),
        published_code=group["variant"] == "hf",
        seed=check_seed(group["seed"]),
        max_grad_norm=group["max_grad_norm"],
        decay_outside=group["decay"] == "all",
        child_norm=group["norm_of"] == "child",
    )


def check_norm(groups: list[StepGroup]) -> None:
    """Raises ValueError if a norm is asked for that no rank knows."""
    if any(group.slices is not None for group in groups) and any(group.max_grad_norm is not None for group in groups):
        raise ValueError(
            "ChildAdamW: max_grad_norm does not know the norm of gradients sharded over ranks; leave it None and "
            "call torch.nn.utils.clip_grad_norm_ before the step"
        )


def unscale(groups: list[StepGroup], grad_scale: Tensor | float | None) -> None:
    """Divides the groups' `grad_factor` by a GradScaler's scale."""
    if grad_scale is not None:
        scale = float(grad_scale)
        for group in groups:
            group.grad_factor /= scale


def clip(native: ModuleType | None, on_native: list[StepGroup], elsewhere: list[StepGroup]) -> None:
    """Multiplies the groups' clip factors into their `grad_factor`; reads the gradients once, writes none."""
    groups = on_native + elsewhere
    if all(group.max_grad_norm is None for group in groups):
        return
    squares = 0.0
    if on_native:
        squares += native.sum_of_squares(*_normed(on_native), torch.get_num_threads())
    squares += fallback.sum_of_squares(*_normed(elsewhere))
    norm = math.sqrt(squares) * abs(groups[0].grad_factor)
    for group in groups:
        if group.max_grad_norm is not None:
            factor = group.max_grad_norm / (norm + 1e-6)
            group.grad_factor *= 1.0 if factor >= 1.0 else factor  # a NaN gets through, as in clip_grad_norm_
            group.max_grad_norm = None  # done, whoever steps the group


def _normed(groups: list[StepGroup]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients that the norm is of, and for each the mask of what counts in it."""
    rows: list[tuple[int, Tensor, Tensor | None]] = []
    for group in groups:
        bits = group.child_bits if group.child_norm and group.child_bits else [None] * len(group.grads)
        rows += zip(group.indices, group.grads, bits, strict=True)
    rows.sort(key=lambda row: row[0])  # the sum's order must not depend on how parameters were grouped
    return [row[1] for row in rows], [row[2] for row in rows]
