"""The optimizer state of one parameter: its beginning, and its way out of a checkpoint."""

import copy
from typing import Any

import torch
from torch import Tensor

from .checks import compute_dtype

_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def init_state(state: dict[str, Any], param: Tensor, amsgrad: bool) -> None:
    """Begins a parameter's state, tensors named as torch.optim.AdamW names them, or adds what amsgrad needs to it."""

    def zeros() -> Tensor:
        return torch.zeros_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)

    if not state:
        state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=zeros(), exp_avg_sq=zeros())
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()


def restored_state(param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of one parameter's saved state, on the parameter's device, in the dtype that the step computes in."""
    state = {k: copy.deepcopy(v) for k, v in saved.items() if k not in _AVERAGES and k != "step"}
    step = saved.get("step", 0.0)
    state["step"] = torch.as_tensor(step, dtype=torch.float32, device="cpu").detach().clone().reshape(())
    for key in _AVERAGES:
        if key in saved:
            if not isinstance(saved[key], Tensor):
                raise TypeError(f"load_state_dict: state '{key}' must be a tensor (got {type(saved[key]).__name__})")
            state[key] = saved[key].detach().to(device=param.device, dtype=compute_dtype(param), copy=True)
    return state
