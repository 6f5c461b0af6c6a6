"""The optimizer state of one parameter and its mask: how they begin, and how a checkpoint restores them."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, is_sharded
from ..child import ChildNetwork
from ..ops.packed_mask import Masks, PackedMask
from ..ops.step_group import compute_dtype

_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def has_begun(state: dict[str, Any], amsgrad: bool = False) -> bool:
    """Returns whether a parameter has all of its state; before its first step it has what `mark_child` gave it."""
    if not state or ("exp_avg" not in state and "child_mask" in state and state.get("step") == 0):
        return False
    return not amsgrad or "max_exp_avg_sq" in state


def mark_child(state: dict[str, Any], mask: PackedMask) -> None:
    """Puts a mask into a parameter's state, and a step count, which torch requires in a state that is not empty."""
    state.update(child_mask=mask.bits, step=torch.zeros((), dtype=torch.float32))


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
        if mask is not None:
            mark_child(state, mask)
        state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=zeros(), exp_avg_sq=zeros())
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()


def masks_of(child: ChildNetwork, group: dict[str, Any]) -> Masks:
    """Returns the child network's masks of a group's parameters, on the parameters' devices.

    Raises:
        ValueError: one of these parameters is sharded.
    """
    names = group.get("param_names") or itertools.repeat(None)
    found = {param: child.mask_of(param, name) for param, name in zip(group["params"], names)}  # noqa: B905
    masks = {param: mask.to(param.device) for param, mask in found.items() if mask is not None}
    if any(map(is_sharded, masks)):
        raise ValueError("ChildAdamW: child= does not support sharded parameters (DTensor); shard after training")
    return masks


def check_saved_state(saved: Any) -> None:
    """Raises TypeError unless this is the state of a parameter, with one number as its step count."""
    check_type("load_state_dict: the state of a parameter", saved, dict, "a dict")
    step = saved.get("step", 0.0)
    if not isinstance(step, (int, float, Tensor)) or (isinstance(step, Tensor) and step.numel() != 1):
        raise TypeError(f"load_state_dict: state 'step' must be one number (got {step!r})")


def restored_state(param: Tensor, saved: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """Returns a copy of a parameter's saved state, on the parameter's device, in the dtype that its step computes in.

    With a mask, the state holds the child network's values alone; those of a dense saved state are gathered.

    Raises:
        TypeError: a value of the state is no tensor.
        ValueError: a value of the state has another shape than the parameter, or its mask, requires.
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
