"""The optimizer state of one parameter: its beginning, and its way out of a checkpoint."""

import copy
from typing import Any

import torch
from torch import Tensor

from .checks import check_type, compute_dtype
from .packed_mask import PackedMask

_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def has_begun(state: dict[str, Any], amsgrad: bool = False) -> bool:
    """Whether a parameter has all of its state; before its first step, what `mark_child` gave it at most."""
    if not state or ("exp_avg" not in state and "child_mask" in state and state.get("step") == 0):
        return False
    return not amsgrad or "max_exp_avg_sq" in state


def mark_child(state: dict[str, Any], mask: PackedMask) -> None:
    """Puts a child network's mask into a parameter's state; torch wants a step count in any that is not empty."""
    state.update(child_mask=mask.bits, step=torch.zeros((), dtype=torch.float32))


def init_state(state: dict[str, Any], param: Tensor, mask: PackedMask | None, amsgrad: bool) -> None:
    """Begins a parameter's state, tensors named as torch.optim.AdamW names them, or adds what amsgrad needs to it.

    The step count begins on the CPU; a GPU that steps the parameter may move it there.
    """

    def zeros() -> Tensor:
        dtype = compute_dtype(param)
        if mask is not None:
            return param.new_zeros(mask.count, dtype=dtype)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    if not has_begun(state):
        if mask is not None:
            mark_child(state, mask)
        state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=zeros(), exp_avg_sq=zeros())
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()


def check_saved_state(saved: Any) -> None:
    """Raises TypeError unless this is the state of a parameter, and its step count a number."""
    check_type("load_state_dict: the state of a parameter", saved, dict, "a dict")
    step = saved.get("step", 0.0)
    if not isinstance(step, (int, float, Tensor)) or (isinstance(step, Tensor) and step.numel() != 1):
        raise TypeError(f"load_state_dict: state 'step' must be one number (got {step!r})")


def restored_state(param: Tensor, saved: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """A copy of one parameter's saved state, on the parameter's device, in the dtype that the step computes in.

    With a mask it is the child network's; of a state that was saved without one, its values are gathered.

    Raises:
        TypeError: a state is no tensor.
        ValueError: a state has not the shape that the parameter, or its mask, requires.
    """
    state = {k: copy.deepcopy(v) for k, v in saved.items() if k not in (*_AVERAGES, "step", "child_mask")}
    if mask is not None:
        mark_child(state, mask)
    if not has_begun(saved):
        return state
    state["step"] = (
        torch.as_tensor(saved.get("step", 0.0), dtype=torch.float32, device="cpu").detach().clone().reshape(())
    )
    for key in (key for key in _AVERAGES if key in saved):
        value = saved[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"load_state_dict: state '{key}' must be a tensor (got {type(value).__name__})")
        if mask is not None:
            value = _child_values(key, value, param if "child_mask" not in saved else None, mask)
        state[key] = value.detach().to(device=param.device, dtype=compute_dtype(param), copy=True)
    return state


def _child_values(key: str, value: Tensor, dense_like: Tensor | None, mask: PackedMask) -> Tensor:
    """The child network's part of a saved state: itself, or gathered, where it is dense."""
    required = (mask.count,) if dense_like is None else tuple(dense_like.shape)
    if value.shape != required:
        raise ValueError(
            f"load_state_dict: state '{key}' must have the shape {required} (got {tuple(value.shape)}); the checkpoint "
            "is damaged, or of another model"
        )
    return value if dense_like is None else mask.to(value.device).gather(value)


def dense_state(state: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """A parameter's state as an optimizer without a child network has it: zeros outside; {} before the first step."""
    if not has_begun(state):
        return {}
    dense = {k: v for k, v in state.items() if k != "child_mask"}
    for key in _AVERAGES:
        if mask is not None and key in dense:
            dense[key] = mask.scatter(dense[key])
    return dense
