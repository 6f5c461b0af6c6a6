"""The optimizer state of one parameter and its mask: how they begin, and how a checkpoint restores them."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, is_sharded, shown
from ..ops.packed_mask import Masks, PackedMask
from ..ops.step_group import compute_dtype

AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BEFORE_FIRST_STEP = {"child_mask", "step"}  # torch wants a step count in a state that is not empty


def has_begun(state: dict[str, Any], amsgrad: bool = False) -> bool:
    """Returns whether a parameter has all of its state; before its first step, a checkpoint holds its mask at most."""
    if "exp_avg" not in state and state.keys() <= _BEFORE_FIRST_STEP and state.get("step", 0) == 0:
        return False
    return not amsgrad or "max_exp_avg_sq" in state


def incomplete(error: KeyError) -> ValueError:
    """Returns the error for a group or a state without an entry."""
    return ValueError(
        f"ChildAdamW: {error} is missing in a group or in the state of a parameter; load a whole checkpoint, or delete "
        "that parameter's state to begin anew"
    )


def begin(state: dict[str, Any], param: Tensor, masks: Masks | None, amsgrad: bool) -> PackedMask | None:
    """Begins a parameter's state with torch.optim.AdamW's names, or adds to it what amsgrad needs.

    The step count begins on the CPU. A GPU that steps the parameter may move it there.

    Returns:
        The parameter's mask, moved to the device where the parameter is now; None if it is not masked.
    """
    mask = masks.get(param) if masks else None
    if masks and mask is not None:
        mask = masks[param] = mask.to(param.device)

    local = param._local_tensor if is_sharded(param) else param

    def zeros() -> Tensor:
        dtype = compute_dtype(param)
        if mask is not None:
            return local.new_zeros(mask.count, dtype=dtype)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    if not has_begun(state):
        state.update(step=_no_steps(), exp_avg=zeros(), exp_avg_sq=zeros())
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()
    return mask


def _no_steps() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu")  # whatever torch.set_default_device says


def copied(value: Any, where: str) -> Any:
    """Returns a deep copy; raises TypeError for what cannot be copied."""
    try:
        return copy.deepcopy(value)
    except (TypeError, AttributeError) as error:
        raise TypeError(f"load_state_dict: {where} must hold what can be copied ({error})") from error


def saved_state(state: dict[str, Any], param: Tensor, mask: PackedMask) -> dict[str, Any]:
    """Returns the state of a masked parameter for a checkpoint, with a copy of its mask.

    That of a sharded parameter is dense: its averages, zeros outside the child network, and its mask are DTensors of
    the parameter's shape and placements, which torch.distributed.checkpoint can cut in another way. These and its step
    count are copies; all else is shared.
    """
    if not is_sharded(param):
        return {"step": _no_steps(), **state, "child_mask": mask.bits.clone()}
    from ..ops.shards import dtensor_like

    dense = {key: mask.scatter(state[key]) for key in AVERAGES if key in state} | {"child_mask": mask.unpack()}
    step = state["step"].clone() if "step" in state else _no_steps()  # of the same moment as the averages
    return {**state, "step": step} | {key: dtensor_like(value, param) for key, value in dense.items()}


def saved_mask(param: Tensor, bits: Any) -> PackedMask:
    """Returns the whole mask that a checkpoint holds of a parameter: packed, or bools, whole or cut in any way.

    Raises:
        ValueError: it is no tensor with values, or does not fit the parameter.
    """
    if not isinstance(bits, Tensor) or bits.is_meta or bits.layout != torch.strided:
        got = f"one of {bits.layout} on {bits.device}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"load_state_dict: state 'child_mask' must be a tensor with values (got {got})")
    bits = _whole(bits.detach())
    if bits.dtype != torch.bool:
        return PackedMask(param.shape, bits.to(param.device, copy=True))
    if bits.shape != param.shape:
        raise ValueError(
            f"load_state_dict: state 'child_mask' must have the parameter's shape {tuple(param.shape)} (got "
            f"{tuple(bits.shape)}); the checkpoint is damaged, or of another model"
        )
    return PackedMask.pack(bits.to(param.device))


def _whole(tensor: Tensor) -> Tensor:
    """Returns all of a DTensor, for which all ranks of its mesh must come here; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    from ..ops.shards import whole_tensor

    return whole_tensor(tensor)


def restored_state(param: Tensor, saved: dict[str, Any], mask: PackedMask | None, dense: bool) -> dict[str, Any]:
    """Returns a copy of a parameter's saved state, on the parameter's device, in the dtype that its step computes in.

    Args:
        param: the parameter.
        saved: its state in a checkpoint.
        mask: the parameter's mask, with which the state holds the child network's values alone; None without one.
        dense: whether the saved state is that of an optimizer without child network, whose values are gathered.

    Raises:
        TypeError: a value of the state cannot be copied.
        ValueError: a value of the state has another shape than the parameter, or its mask, requires, or the step count
            is none.
    """
    if not has_begun(saved):
        return {}
    state = {k: copied(v, f"state {shown(k)}") for k, v in saved.items() if k not in (*AVERAGES, "step", "child_mask")}
    step = saved.get("step", 0.0)
    dtype = torch.float64 if isinstance(step, Tensor) and step.dtype == torch.float64 else torch.float32
    state["step"] = torch.as_tensor(step, dtype=dtype, device="cpu").detach().clone().reshape(())
    count = state["step"].item()
    if not 0 <= count < math.inf or count != int(count):
        raise ValueError(f"load_state_dict: state 'step' must be a whole number of steps taken (got {count})")
    for key in (key for key in AVERAGES if key in saved):
        value = _of_rank(key, saved[key].detach(), param, mask, dense, saved.get("child_mask"))
        value = value.to(device=param.device, dtype=compute_dtype(param), copy=True)
        state[key] = value if mask is not None else _placed(value, param)
    return state


def _of_rank(key: str, value: Tensor, param: Tensor, mask: PackedMask | None, dense: bool, bits: Any) -> Tensor:
    """Returns what this rank needs of a saved value: all of it, its part, or the child network's values in that.

    The value may be dense, whole or cut in any way, or hold the child network's values alone. Then `bits`, the saved
    mask, must say for a sharded parameter where in the whole they are.
    """
    sharded = is_sharded(param)
    required = tuple(param.shape if mask is None or dense else (mask.whole_count,))
    if tuple(value.shape) == required != tuple(param.shape):
        if not sharded:
            return _whole(value)
        whole = saved_mask(param, bits)
        value = whole.scatter(_whole(value).to(whole.bits.device))  # torch may have cut it as it would a dense one
    elif value.shape != param.shape:
        raise ValueError(
            f"load_state_dict: state '{key}' must have the shape {required} (got {tuple(value.shape)}); the checkpoint "
            "is damaged, or of another model"
        )
    if is_sharded(param):
        from ..ops.shards import local_values

        value = local_values(value, param)
    else:
        value = _whole(value)
    return value if mask is None else mask.to(value.device).gather(value)


def _placed(value: Tensor, param: Tensor) -> Tensor:
    """Returns a value as a DTensor that is placed as the parameter, where that is one."""
    if not is_sharded(param):
        return value
    from ..ops.shards import dtensor_like

    return dtensor_like(value, param)


def dense_state(state: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """Returns a parameter's state as without a child network, zeros outside it; {} before the first step."""
    if not has_begun(state):
        return {}
    dense = {k: v for k, v in state.items() if k != "child_mask"}
    for key in AVERAGES:
        if mask is not None and key in dense and not is_sharded(dense[key]):
            check_type(f"dense_state_dict: state '{key}'", dense[key], Tensor, "a tensor")
            dense[key] = mask.scatter(dense[key])
    return dense
