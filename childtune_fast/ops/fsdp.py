"""Modules under torch's fully_shard (FSDP2), whose parameters are DTensors only while they are sharded."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Returns the modules in a model that fully_shard was applied to, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever applied it has imported this
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Shards what a forward pass without a backward pass has left whole, such as the root module's parameters."""
    for module in fsdp_modules(model):
        module.reshard()


def reset(model: nn.Module) -> None:
    """Shards a model again, without gradients that are not reduced, wherever a pass over it has ended by an error."""
    for module in fsdp_modules(model):
        # torch before 2.13 has no reset_iter_state, and it raises for a model that has not run and for inner modules
        with contextlib.suppress(AttributeError, RuntimeError):
            module.reset_iter_state()
        module.reshard()
        for param in _params(module):  # torch keeps these gradients, and would add the next ones to them
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def accumulates(module: Any) -> bool:
    """Returns whether an FSDP module is amid the accumulation of gradients, which it reduces in a later pass.

    Until set_requires_gradient_sync(True) or the like, and a backward pass after that.
    """
    flags = [getattr(group, name, True) for group in _groups(module) for name in ("reduce_grads", "all_reduce_grads")]
    flags.append(getattr(module._get_fsdp_state()._state_ctx, "is_last_backward", True))
    held = [getattr(getattr(param, "_unsharded_param", None), "grad", None) for param in _params(module)]
    held += [getattr(param, "unsharded_accumulated_grad", None) for param in _params(module)]
    return not all(flags) or any(grad is not None for grad in held)


def _groups(module: Any) -> list[Any]:
    """Returns torch's own record of a module's parameters; its names are private, and differ between releases."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _params(module: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(getattr(group, "fsdp_params", ()) for group in _groups(module))
