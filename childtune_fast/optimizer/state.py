"""The optimizer state of one parameter and its mask: how they begin, what a step reads, and what is saved of them."""

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import is_sharded
from ..ops.codes import block_count
from ..ops.packed_mask import Masks, PackedMask
from ..ops.step_group import STORED_AS, State, compute_dtype, other_state
from .kinds import AVERAGES, CODES, SCALES, is_coded, names_of

_BEFORE_FIRST_STEP = {"child_mask", "step"}  # torch wants a step count in a state that is not empty


def has_begun(state: dict[str, Any], amsgrad: bool = False) -> bool:
    """Returns whether a parameter has all of its state; before its first step, a checkpoint holds its mask at most."""
    if "exp_avg" not in state and state.keys() <= _BEFORE_FIRST_STEP and state.get("step", 0) == 0:
        return False
    return not amsgrad or AVERAGES[2] in state or CODES[2] in state


def incomplete(error: KeyError) -> ValueError:
    """Returns the error for a group or a state without an entry."""
    return ValueError(
        f"ChildAdamW: {error} is missing in a group or in the state of a parameter; load a whole checkpoint, or delete "
        "that parameter's state to begin anew"
    )


def begin(
    state: dict[str, Any], param: Tensor, masks: Masks | None, amsgrad: bool, kind: State = "float32"
) -> PackedMask | None:
    """Begins a parameter's state, or adds to it what amsgrad needs.

    It has torch.optim.AdamW's names, or for codes those of kinds.py. The step count begins on the CPU. A GPU that steps
    the parameter may move it there.

    Returns:
        The parameter's mask, moved to the device where the parameter is now; None if it is not masked.
    """
    mask = masks.get(param) if masks else None
    if masks and mask is not None:
        mask = masks[param] = mask.to(param.device)
    if not has_begun(state):
        state["step"] = _no_steps()
        for key in AVERAGES[:2]:
            state.update(_zeros(key, param, mask, kind))
    if amsgrad:
        state.update(_zeros(AVERAGES[2], param, mask, kind))
    return mask


def _zeros(key: str, param: Tensor, mask: PackedMask | None, kind: State) -> dict[str, Tensor]:
    """Returns the entries of a state for one average, before the first step."""
    local: Tensor = param._local_tensor if is_sharded(param) else param
    dtype = STORED_AS.get(kind, compute_dtype(param))
    if mask is not None:
        value = local.new_zeros(mask.count, dtype=dtype)
    else:
        order = torch.contiguous_format if kind == "8bit" else torch.preserve_format
        value = torch.zeros_like(param, dtype=dtype, memory_format=order)
    if kind != "8bit":
        return {key: value}
    scales = local.new_zeros(block_count(local.numel()), dtype=torch.uint8)
    if mask is None and is_sharded(param):
        from .placed import scales_like

        scales = scales_like(scales, param)
    return {f"{key}_codes": value, f"{key}_scales": scales}


def begun(
    param: Tensor,
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    amsgrad: bool,
    kind: State,
    undo: dict[Tensor, dict[str, Any] | None],
) -> tuple[dict[str, Any], PackedMask | None]:
    """Returns a parameter's state and its mask; begins the state, or extends it, where it lacks what a step needs.

    Args:
        param: the parameter.
        states: {parameter: its state}, the optimizer's state.
        masks: {parameter: mask} of the child network; None without one.
        amsgrad: whether the parameter's group has amsgrad.
        kind: how its state is stored.
        undo: receives what a state was that this call begins or extends; None for none.
    """
    state = states.get(param)
    mask = masks.get(param) if masks else None
    if state is None or ((amsgrad or names_of(kind)[0] not in state) and not has_begun(state, amsgrad)):
        undo.setdefault(param, dict(states[param]) if param in states else None)
        state = states[param]
        mask = begin(state, param, masks, amsgrad, kind)
    return state, mask


def averages_of(
    state: dict[str, Any], kind: State, amsgrad: bool, param: Tensor, i: int
) -> tuple[list[Any], list[Any]]:
    """Returns the averages in a state, that of the maximum last, and of 8-bit state their scales.

    Raises:
        ValueError: parameter `i` has a state that is stored in another way than `kind`, or one without an entry.
    """
    count = 3 if amsgrad else 2
    names = (*names_of(kind)[:count], *(SCALES[:count] if kind == "8bit" else ()))
    try:
        entries = [state[name] for name in (*names, "step")]
    except KeyError as error:
        raise unlike(error, state, kind, param, i) from error
    return entries[:count], entries[count:-1]


def unlike(error: KeyError, state: dict[str, Any], kind: State, param: Tensor, i: int) -> ValueError:
    """Returns the error for the state of parameter `i`, without an entry that a state stored as `kind` has."""
    coded = is_coded(state)
    if coded == (kind == "8bit") or not (coded or AVERAGES[0] in state):
        return incomplete(error)
    got = "8bit" if coded else str(getattr(state[AVERAGES[0]], "dtype", None)).removeprefix("torch.")
    return other_state(f"the state of parameter {i} of shape {tuple(param.shape)}", kind, got)


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
    from .placed import scales_like

    dense = {key: mask.scatter(state[key]) for key in (*AVERAGES, *CODES) if key in state}
    step = state["step"].clone() if "step" in state else _no_steps()  # of the same moment as the averages
    scales = {key: scales_like(state[key].clone(), param) for key in SCALES if key in state}
    placed = {key: dtensor_like(value, param) for key, value in (dense | {"child_mask": mask.unpack()}).items()}
    return {**state, "step": step} | placed | scales
