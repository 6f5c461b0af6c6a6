"""The options of a group that torch.optim.AdamW does not have: their words, and what else they must be."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..arguments import shown
from ..ops.random_mask import keep_threshold
from ..ops.step_group import State

Decay = Literal["auto", "all", "child"]
Variant = Literal["torch", "hf"]
NormOf = Literal["all", "child"]
Rounding = Literal["nearest", "stochastic"]
_DECAYS, _VARIANTS, _NORMS_OF, _STATES, _ROUNDINGS = map(get_args, (Decay, Variant, NormOf, State, Rounding))
# Of a group, besides reserve_p.
OWN_OPTIONS = ("decay", "variant", "max_grad_norm", "norm_of", "state", "rounding", "seed")


def check_options(options: dict[str, Any], seed: int) -> None:
    """Raises if an option of a group is invalid; checks those that torch.optim.AdamW does not know or does not refuse.

    Args:
        options: the group's options; without `reserve_p` if there is a child network.
        seed: the optimizer's seed, which every group must have.

    Raises:
        ValueError: an option is out of its range or cannot be honoured.
        TypeError: `reserve_p` is no number.
    """
    if "reserve_p" in options:
        keep_threshold(options["reserve_p"])
    if not isinstance(options["seed"], int) or options["seed"] != seed:
        raise ValueError("ChildAdamW: seed is one for the whole optimizer; pass it to the constructor, not in a group")
    if options["decay"] not in _DECAYS:
        raise ValueError(f"decay must be 'auto', 'all' or 'child' (got {shown(options['decay'])})")
    if options["norm_of"] not in _NORMS_OF:
        raise ValueError(f"norm_of must be 'all' or 'child' (got {shown(options['norm_of'])})")
    if options["variant"] not in _VARIANTS:
        raise ValueError(
            f"variant must be 'torch' or 'hf', the published code's arithmetic (got {shown(options['variant'])})"
        )
    check_storage(options)
    if options["variant"] == "hf" and options["amsgrad"]:
        raise ValueError("variant='hf' has no amsgrad; use amsgrad=False or variant='torch'")
    max_grad_norm = options["max_grad_norm"]
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(
            f"max_grad_norm must be a number above 0, or None for no clipping (got {shown(max_grad_norm)})"
        )
    if options["differentiable"]:
        raise ValueError("ChildAdamW cannot be differentiated through; use torch.optim.AdamW(differentiable=True)")


def check_storage(options: Mapping[str, Any]) -> None:
    """Raises ValueError unless a group's `state` and `rounding` are words that are known."""
    if options["state"] not in _STATES:
        raise ValueError(f"state must be 'float32', 'bfloat16' or '8bit' (got {shown(options['state'])})")
    if options["rounding"] not in _ROUNDINGS:
        raise ValueError(
            "rounding, that of bfloat16 and float16 parameters, must be 'nearest' or 'stochastic' (got "
            f"{shown(options['rounding'])})"
        )


def settle_options(group: dict[str, Any], masked: bool) -> None:
    """Makes the options of a group with a child network show what its steps do: no reserve_p, and no "auto" decay."""
    if masked:
        group.pop("reserve_p", None)
        if group.get("decay") == "auto":
            group["decay"] = "child"
