"""What is to be stepped: the optimizer's parameters and options, turned into the structs that the backends take."""

import itertools
import math
from collections import defaultdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import fallback
from .checks import check_mask, check_options
from .mask import KEEP_ALL, check_seed, keep_threshold
from .state import has_begun, init_state
from .step_group import StepGroup

PLAIN_TENSORS = (Parameter, Tensor)  # any other class may be a DTensor


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return type(param) not in PLAIN_TENSORS and hasattr(param, "placements")


def collect(
    optimizer: torch.optim.Optimizer, use_native: bool, states_before: dict[Tensor, dict[str, Any]]
) -> tuple[list[StepGroup], list[StepGroup]]:
    """Sorts the parameters that have a gradient by who steps them: the compiled kernels, or the fallback.

    Args:
        optimizer: a ChildAdamW.
        use_native: whether there are compiled kernels; they take what lies on the CPU.
        states_before: receives, for each parameter whose state this call begins or extends, what it was.

    Raises:
        KeyError: a group or the state of a parameter lacks an entry.
    """
    on_native: list[StepGroup] = []
    on_torch: list[StepGroup] = []
    states, masks = optimizer.state, optimizer.child_masks
    index = itertools.count()
    for group in optimizer.param_groups:
        amsgrad = group["amsgrad"]
        rows = defaultdict(list)  # (native, sharded, masked): what a StepGroup's lists hold of each parameter
        plain_rows: list[tuple[Any, ...]] = rows[True, False, False]
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
                init_state(state, param, mask, amsgrad)
            row = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], i)
            if amsgrad:
                row = (*row, state["max_exp_avg_sq"])
            if mask is not None:
                check_mask(mask, param)
                rows[use_native and param.is_cpu, False, True].append((*row, mask.bits, mask.ranks))
            elif type(param) is Parameter and use_native and param.is_cpu:  # mostly; a step has 2 us per parameter
                plain_rows.append(row)
            else:
                rows[use_native and param.is_cpu, is_sharded(param), False].append(row)
        kinds = {kind: _step_group(group, optimizer, of_kind, *kind[1:]) for kind, of_kind in rows.items() if of_kind}
        on_native += [target for kind, target in kinds.items() if kind[0]]
        on_torch += [target for kind, target in kinds.items() if not kind[0]]
    return on_native, on_torch


def _step_group(
    group: dict[str, Any], optimizer: torch.optim.Optimizer, rows: list[tuple[Any, ...]], sharded: bool, masked: bool
) -> StepGroup:
    """Turns the rows of `collect` into columns, DTensors into what this rank holds of them."""
    target = _empty_step_group(group, optimizer)
    if sharded:
        from .sharding import local_tensor, mask_slice

        target.slices = [mask_slice(row[0]) for row in rows]
        rows = [tuple(local_tensor(entry) for entry in row) for row in rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    if masked:
        target.child_ranks = columns.pop()
        target.child_bits = columns.pop()
    target.params, target.grads, target.exp_avgs, target.exp_avg_sqs, target.steps, target.indices = columns[:6]
    if len(columns) > 6:
        target.max_exp_avg_sqs = columns[6]
    return target


def _empty_step_group(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> StepGroup:
    check_options(group, optimizer.seed)  # options may have been changed since they were given
    grad_scale = getattr(optimizer, "grad_scale", None)
    grad_factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    return StepGroup(
        lr=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        grad_factor=-grad_factor if group["maximize"] else grad_factor,
        # With a child network there are no random masks, whatever a checkpoint or an editor put into the group.
        keep_threshold=KEEP_ALL if optimizer.child_masks else keep_threshold(group["reserve_p"]),
        published_code=group["variant"] == "hf",
        seed=check_seed(group["seed"]),
        max_grad_norm=group["max_grad_norm"],
        decay_outside=group["decay"] == "all",
        child_norm=group["norm_of"] == "child",
    )


def clip(native: ModuleType | None, on_native: list[StepGroup], on_torch: list[StepGroup]) -> None:
    """Multiplies the groups' clip factors into their `grad_factor`; reads the gradients once, writes none."""
    groups = on_native + on_torch
    if all(group.max_grad_norm is None for group in groups):
        return
    if any(group.slices is not None for group in groups):
        raise ValueError(
            "ChildAdamW: max_grad_norm does not know the norm of gradients sharded over ranks; leave it None and "
            "call torch.nn.utils.clip_grad_norm_ before the step"
        )
    squares = 0.0
    if on_native:
        squares += native.sum_of_squares(*_normed(on_native), torch.get_num_threads())
    squares += fallback.sum_of_squares(*_normed(on_torch))
    norm = math.sqrt(squares) * abs(groups[0].grad_factor)
    for group in groups:
        if group.max_grad_norm is not None:
            factor = group.max_grad_norm / (norm + 1e-6)
            group.grad_factor *= 1.0 if factor >= 1.0 else factor  # a NaN gets through, as in clip_grad_norm_


def _normed(groups: list[StepGroup]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients that the norm is of, and for each the mask of what counts in it."""
    rows: list[tuple[int, Tensor, Tensor | None]] = []
    for group in groups:
        bits = group.child_bits if group.child_norm and group.child_bits else [None] * len(group.grads)
        rows += zip(group.indices, group.grads, bits, strict=True)
    rows.sort(key=lambda row: row[0])  # the sum's order must not depend on how parameters were grouped
    return [row[1] for row in rows], [row[2] for row in rows]
