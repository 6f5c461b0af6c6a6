"""The optimizer state of one parameter and its mask: how they begin, and how a checkpoint restores them."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type
from ..ops.packed_mask import PackedMask
from ..ops.step_group import compute_dtype

_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BEFORE_FIRST_STEP = {"child_mask", "step"}  # torch wants a step count in a state that is not empty


def has_begun(state: dict[str, Any], amsgrad: bool = False) -> bool:
    """Returns whether a parameter has all of its state; before its first step, a checkpoint holds its mask at most."""
    if "exp_avg" not in state and state.keys() <= _BEFORE_FIRST_STEP and state.get("step", 0) == 0:
        return False
    return not amsgrad or "max_exp_avg_sq" in state


def init_state(state: dict[str, Any], param: Tensor, mask: PackedMask | None, amsgrad: bool) -> None:
    """Begins a parameter's state with torch.optim.AdamW's names, or adds to it what amsgrad needs.

    The step count begins on the CPU. A GPU that steps the parameter may move it there.
    """

    def zeros() -> Tensor:
        dtype = compute_dtype(param)
        if mask is not None:
            return param.new_zeros(mask.count, dtype=dtype)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    if not has_begun(state):
        state.update(step=_no_steps(), exp_avg=zeros(), exp_avg_sq=zeros())
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()


def _no_steps() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu")  # whatever torch.set_default_device says


def check_saved_state(saved: Any) -> None:
    """Raises TypeError unless this is the state of a parameter, with one number as its step count."""
    check_type("load_state_dict: the state of a parameter", saved, dict, "a dict")
    step = saved.get("step", 0.0)
    if not isinstance(step, (int, float, Tensor)) or (isinstance(step, Tensor) and step.numel() != 1):
        raise TypeError(f"load_state_dict: state 'step' must be one number (got {step!r})")


def saved_state(state: dict[str, Any], mask: PackedMask) -> dict[str, Any]:
    """Returns the state of a masked parameter for a checkpoint, with a copy of its mask; all else is shared."""
    return {"step": _no_steps(), **state, "child_mask": mask.bits.clone()}


def restored_state(param: Tensor, saved: dict[str, Any], mask: PackedMask | None, dense: bool) -> dict[str, Any]:
    """Returns a copy of a parameter's saved state, on the parameter's device, in the dtype that its step computes in.

    Args:
        param: the parameter.
        saved: its state in a checkpoint.
        mask: the parameter's mask, with which the state holds the child network's values alone; None without one.
        dense: whether the saved state is that of an optimizer without child network, whose values are gathered.

    Raises:
        TypeError: a value of the state is no tensor.
        ValueError: a value of the state has another shape than the parameter, or its mask, requires.
    """
    if not has_begun(saved):
        return {}
    state = {k: copy.deepcopy(v) for k, v in saved.items() if k not in (*_AVERAGES, "step", "child_mask")}
    step = saved.get("step", 0.0)
    dtype = torch.float64 if isinstance(step, Tensor) and step.dtype == torch.float64 else torch.float32
    state["step"] = torch.as_tensor(step, dtype=dtype, device="cpu").detach().clone().reshape(())
    for key in (key for key in _AVERAGES if key in saved):
        value = saved[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"load_state_dict: state '{key}' must be a tensor (got {type(value).__name__})")
        if mask is not None:
            value = _child_values(key, value, param if dense else None, mask)
        state[key] = value.detach().to(device=param.device, dtype=compute_dtype(param), copy=True)
    return state


def _child_values(key: str, value: Tensor, dense_like: Tensor | None, mask: PackedMask) -> Tensor:
    """Returns the child network's part of a saved value, which is dense if `dense_like` is given."""
    required = (mask.count,) if dense_like is None else tuple(dense_like.shape)
    if value.shape != required:
        raise ValueError(
            f"load_state_dict: state '{key}' must have the shape {required} (got {tuple(value.shape)}); the checkpoint "
            "is damaged, or of another model"
        )
    return value if dense_like is None else mask.to(value.device).gather(value)


def dense_state(state: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """Returns a parameter's state as without a child network, zeros outside it; {} before the first step."""
    if not has_begun(state):
        return {}
    dense = {k: v for k, v in state.items() if k != "child_mask"}
    for key in _AVERAGES:
        if mask is not None and key in dense:
            dense[key] = mask.scatter(dense[key])
    return dense
