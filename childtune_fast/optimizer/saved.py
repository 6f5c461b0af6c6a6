"""Checks of a checkpoint, in sentences, before anything of it is loaded."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, lost_memory, shown
from .groups import check_names
from .kinds import AVERAGES, CODED, CODES, SCALES, is_coded
from .state import has_begun

_IN_EVERY_GROUP = ("lr", "betas", "eps", "weight_decay")  # of every AdamW that has ever been
_DAMAGED = "the checkpoint is damaged, or of another optimizer"


def check_checkpoint(state_dict: Any) -> None:
    """Raises unless this has the form of an optimizer's checkpoint.

    Raises:
        TypeError: it, its groups, their parameters' numbers or names, the state of a parameter or a value in that is of
            another kind.
        ValueError: a group or a state lacks an entry, a number stands for two parameters, or the states are kept under
            other keys than the numbers, such as strings.
    """
    check_type("load_state_dict: state_dict", state_dict, Mapping, "what an optimizer's state_dict() returned")
    check_type("load_state_dict: 'state' in state_dict", state_dict.get("state"), Mapping, "a mapping")
    check_type("load_state_dict: 'param_groups' in state_dict", state_dict.get("param_groups"), list, "a list")
    for i, group in enumerate(state_dict["param_groups"]):
        _check_group(group, f"load_state_dict: param_groups[{i}]")
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if len(numbers) != len(set(numbers)):
        raise ValueError(f"load_state_dict: every parameter must have a number of its own in 'params'; {_DAMAGED}")
    by_name = {str(number): number for number in numbers}
    for key in state_dict["state"]:
        if isinstance(key, (int, str)) and key != by_name.get(str(key), key):
            raise ValueError(
                f"load_state_dict: 'state' must have the keys that 'params' has (got {shown(key)} for "
                f"{shown(by_name[str(key)])}); a format such as JSON may have changed them, so keep their types"
            )
    for options in (*state_dict["param_groups"], *state_dict["state"].values()):
        for name, value in options.items() if isinstance(options, dict) else ():
            if any(map(lost_memory, value if isinstance(value, (list, tuple)) else (value,))):
                raise ValueError(f"load_state_dict: {shown(name)} must have memory for its values; {_DAMAGED}")
    for number, state in states_of_params(state_dict).items():
        _check_state(state, f"of parameter {shown(number)}")


def states_of_params(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Returns the states of parameters in a checkpoint, which may have values of the user's own beside them."""
    numbers = {i for group in state_dict["param_groups"] for i in group["params"]}
    return {i: state for i, state in state_dict["state"].items() if i in numbers}


def _check_group(group: Any, where: str) -> None:
    check_type(where, group, dict, "a dict")
    missing = [name for name in ("params", *_IN_EVERY_GROUP) if name not in group]
    if missing:
        raise ValueError(f"{where} must have {', '.join(map(repr, missing))} (got none); {_DAMAGED}")
    check_type(f"{where}['params']", group["params"], (list, tuple), "a list of numbers")
    for number in group["params"]:
        if isinstance(number, (Tensor, float)) or not isinstance(number, Hashable):
            raise TypeError(f"{where}['params'] must be a list of numbers (got a {type(number).__name__} in it)")
    check_names(group, where)


def _check_state(state: Any, whose: str) -> None:
    check_type(f"load_state_dict: the state {whose}", state, dict, "a dict")
    step, what = state.get("step", 0.0), f"load_state_dict: state 'step' {whose}"
    if not isinstance(step, (int, float, Tensor)):
        raise TypeError(f"{what} must be one number (got {type(step).__name__})")
    if isinstance(step, Tensor) and (
        step.numel() != 1 or step.is_meta or step.is_complex() or step.layout != torch.strided
    ):
        raise TypeError(f"{what} must be one number (got shape {tuple(step.shape)}, {step.dtype} on {step.device})")
    if not has_begun(state):
        return
    coded = is_coded(state)
    if coded and any(key in state for key in AVERAGES):
        raise ValueError(
            f"load_state_dict: the state {whose} must have its averages once (got floats and codes); {_DAMAGED}"
        )
    count = 3 if CODES[2] in state or SCALES[2] in state else 2
    names = (*CODES[:count], *SCALES[:count]) if coded else AVERAGES[:2]
    missing = [key for key in ("step", *names) if key not in state]
    if missing:
        raise ValueError(
            f"load_state_dict: the state {whose} must have {', '.join(map(repr, missing))} (got {shown(list(state))}); "
            f"{_DAMAGED}"
        )
    for key in (key for key in AVERAGES if key in state):
        _check_average(state[key], f"load_state_dict: state '{key}' {whose}")
    for key in (key for key in CODED if key in state):
        check_bytes(state[key], f"load_state_dict: state '{key}' {whose}")


def _check_average(value: Any, what: str) -> None:
    check_type(what, value, Tensor, "a tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise TypeError(
            f"{what} must be a tensor of floats with values (got {value.dtype}, {value.layout} on {value.device})"
        )


def check_bytes(value: Any, what: str) -> None:
    """Raises TypeError, with a sentence about `what`, unless a value is a tensor of uint8 that has values."""
    check_type(what, value, Tensor, "a tensor")
    if value.dtype != torch.uint8 or value.layout != torch.strided or value.is_meta or lost_memory(value):
        raise TypeError(
            f"{what} must be a tensor of uint8 with values (got {value.dtype}, {value.layout} on {value.device})"
        )
