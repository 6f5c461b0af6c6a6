"""How the state of a parameter is stored, and under which names: as floats, in bfloat16, or as codes in bytes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.step_group import State

AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# torch.optim.AdamW knows none of these names: under its own it would take codes for averages, without a word.
CODES = tuple(f"{key}_codes" for key in AVERAGES)
SCALES = tuple(f"{key}_scales" for key in AVERAGES)
CODED = (*CODES, *SCALES)
LEAST_NUMEL = 4096  # smaller parameters keep their state in the type that computes


def kind_of(word: State, param: Tensor) -> State:
    """Returns how the state of a parameter is stored in a group with this `state`.

    Raises:
        ValueError: the parameter is float64, and the group's state is not "float32".
    """
    if word == "float32":
        return word
    if param.dtype == torch.float64:
        raise ValueError(
            f"ChildAdamW: state={word!r} needs parameters of at most 32 bits (got a float64 one of shape "
            f"{tuple(param.shape)}); give it a group with state='float32', in which its state is float64"
        )
    return word if param.numel() >= LEAST_NUMEL else "float32"


def is_rounded(kind: State, rounding: str, param: Tensor) -> bool:
    """Returns whether steps round anything of a parameter stochastically, whose state is stored as `kind`."""
    return kind != "float32" or (rounding == "stochastic" and param.element_size() == 2)


def names_of(kind: State) -> tuple[str, ...]:
    """Returns the names of the averages in a state, that of the maximum last."""
    return CODES if kind == "8bit" else AVERAGES


def is_coded(state: Mapping[str, Any]) -> bool:
    """Returns whether a state has codes, or a part of them."""
    return any(key in state for key in CODED)
