"""Which parameters of a model are scored, and what is required of them."""

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from ..arguments import Selector, check_model, predicate
from ..ops.fsdp import reshard
from ..ops.tensor_parts import kind_of

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inner_model(model: Any) -> nn.Module:
    """Returns the model inside of DistributedDataParallel, or else the model itself, with its parameters sharded again.

    A forward pass under fully_shard() may have left some of them whole: other tensors, in the place of the parameters.
    """
    check_model(model)
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    reshard(inner)
    return inner


def scored_parameters(model: nn.Module, names: Selector) -> dict[str, Parameter]:
    """Returns the parameters to score, by name: those that require a gradient and are selected."""
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wanted = None if names is None else predicate(names, "names")
    found = {name: param for name, param in trained.items() if wanted is None or wanted(name)}
    if not found:
        listed = ", ".join(list(trained)[:5]) or "none"
        raise ValueError(
            "Fisher scores: `names` must select at least one parameter that requires a gradient (got none of "
            f"{len(trained)}: {listed}{', ...' if len(trained) > 5 else ''}); change `names` or unfreeze some"
        )
    for name, param in found.items():
        _check_scorable(name, param)
    return found


def _check_scorable(name: str, param: Parameter) -> None:
    """Raises ValueError unless a parameter is a dense one of real numbers, with values."""
    kind = kind_of(param)
    if kind in ("meta", "uninitialized"):
        raise ValueError(
            f"Fisher scores: parameters must have values (got '{name}', which is {kind}); load the model's weights "
            "first, or leave it out by `names`"
        )
    if param.layout != torch.strided or param.is_nested or param.dtype not in _DTYPES:
        raise ValueError(
            f"Fisher scores: parameters must be dense and of {' or '.join(map(str, _DTYPES))} (got '{name}', "
            f"{kind or 'dense'}, {param.dtype}); leave it out by `names`"
        )
