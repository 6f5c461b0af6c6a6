"""What is to be stepped: the optimizer's parameters and options, turned into the structs that the backends take."""

import itertools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import fallback
from .mask import keep_threshold
from .state import init_state
from .step_group import StepGroup

PLAIN_TENSORS = (Tensor, Parameter)  # any other class may be a DTensor


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
    index = itertools.count()
    for group in optimizer.param_groups:
        amsgrad = group["amsgrad"]
        targets: dict[tuple[bool, bool], StepGroup] = {}
        for param, i in zip(group["params"], index):  # noqa: B905 - `index` is endless
            grad = param.grad
            if grad is None:
                continue
            if grad.is_neg():  # a lazily negated view, whose memory holds the opposite
                grad = grad.resolve_neg()
            state = optimizer.state[param]
            if not state or (amsgrad and "max_exp_avg_sq" not in state):
                states_before[param] = dict(state)
                init_state(state, param, amsgrad)
            sharded = type(param) not in PLAIN_TENSORS and hasattr(param, "placements")  # a DTensor
            kind = (use_native and param.is_cpu, sharded)
            target = targets.get(kind)
            if target is None:
                target = targets[kind] = _empty_step_group(group, getattr(optimizer, "grad_scale", None))
                (on_native if kind[0] else on_torch).append(target)
            if sharded:
                param, grad, state = _local_parts(target, param, grad, state)
            target.params.append(param)
            target.grads.append(grad)
            target.exp_avgs.append(state["exp_avg"])
            target.exp_avg_sqs.append(state["exp_avg_sq"])
            target.steps.append(state["step"])
            target.indices.append(i)
            if amsgrad:
                target.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
    return on_native, on_torch


def _empty_step_group(group: dict[str, Any], grad_scale: Tensor | None) -> StepGroup:
    grad_factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    return StepGroup(
        lr=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        grad_factor=-grad_factor if group["maximize"] else grad_factor,
        keep_threshold=keep_threshold(group["reserve_p"]),
        published_code=group["variant"] == "hf",
        seed=group["seed"],
        max_grad_norm=group["max_grad_norm"],
    )


def _local_parts(target: StepGroup, param: Tensor, grad: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, dict]:
    """What this rank holds of a sharded parameter (DTensor), and notes in `target` where that lies in the whole."""
    from .sharding import local_tensor, mask_slice

    target.slices = [] if target.slices is None else target.slices
    target.slices.append(mask_slice(param))
    return local_tensor(param), local_tensor(grad), {k: local_tensor(v) for k, v in state.items()}


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
        squares += native.sum_of_squares([g for group in on_native for g in group.grads], torch.get_num_threads())
    squares += fallback.sum_of_squares([g for group in on_torch for g in group.grads])
    norm = math.sqrt(squares) * abs(groups[0].grad_factor)
    for group in groups:
        if group.max_grad_norm is not None:
            factor = group.max_grad_norm / (norm + 1e-6)
            group.grad_factor *= 1.0 if factor >= 1.0 else factor  # a NaN gets through, as in clip_grad_norm_
