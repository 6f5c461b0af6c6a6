"""Checks of a ChildAdamW's child network, ranks and parameters when it is made."""

import contextlib
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..arguments import PLAIN_TENSORS, is_sharded, shown
from ..child import ChildNetwork
from ..ops.memory import check_apart
from ..ops.packed_mask import Masks
from ..ops.step_group import DTYPES
from .groups import check_once
from .kinds import is_rounded, kind_of


def check_child(child: Any, reserve_p_given: bool, reserve_p: float, decay: str) -> None:
    """Raises if the argument `child` is neither None nor a ChildNetwork, or if other arguments contradict it."""
    if child is None:
        if decay == "child":
            raise ValueError("ChildAdamW: decay='child' needs a child network; pass child=, or decay='all'")
        return
    if not isinstance(child, ChildNetwork):
        raise TypeError(f"ChildAdamW: child must be a ChildNetwork (got {shown(child)})")
    if reserve_p_given:
        refuse_reserve_p(reserve_p)


def refuse_reserve_p(reserve_p: Any, where: str = "") -> NoReturn:
    """Raises the ValueError for a reserve_p beside a child network."""
    raise ValueError(
        f"ChildAdamW: reserve_p is not used with child= (got {shown(reserve_p)}{where}); leave it out, the child "
        "network has a share of its own"
    )


def agree_on_seed(defaults: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Gives an optimizer's defaults and groups the seed of rank 0, in an initialised process group."""
    if not _has_ranks():
        return
    agreed = [defaults["seed"]]
    with _on_gpu_of(param_groups):
        torch.distributed.broadcast_object_list(agreed, src=0)
    for options in (defaults, *param_groups):
        options["seed"] = agreed[0]


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _on_gpu_of(param_groups: list[dict[str, Any]]) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU of the first parameter that is on one the current GPU, through which NCCL exchanges objects.

    Without it, ranks of a script that never calls torch.cuda.set_device would all take GPU 0.
    """
    devices = (param.device for group in param_groups for param in group["params"])
    return next((torch.cuda.device(device) for device in devices if device.type == "cuda"), contextlib.nullcontext())


def check_masks(child: ChildNetwork, masks: Masks | None, param_groups: list[dict[str, Any]], whose: str) -> None:
    """Raises ValueError if a child network masks none of an optimizer's parameters, which the error calls `whose`.

    Parameters of its own model may be others: those of a rank, or only biases.
    """
    known = set(child.places.parameters())
    if not masks and any(param not in known for group in param_groups for param in group["params"]):
        raise ValueError(
            f"ChildAdamW: child must mask a parameter of {whose} (got a child network of {len(child.packed)} others); "
            "make it from the model whose parameters these are, after wrapping it"
        )


def check_ranks_agree(child: ChildNetwork | None, param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError on the ranks of an initialised process group whose child networks differ but must not.

    Those that have whole parameters must agree with all ranks, others with the ranks of their parameters' meshes. So
    the stages of a pipeline may have models of their own where these are sharded.
    """
    if not _has_ranks():
        return
    sharded = [param for group in param_groups for param in group["params"] if is_sharded(param)]
    meshes = dict.fromkeys(param.device_mesh for param in sharded)
    peers = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    found: list[Any] = [None] * torch.distributed.get_world_size()
    with _on_gpu_of(param_groups):
        torch.distributed.all_gather_object(found, None if child is None else child.fingerprint)
    different = {identity for rank, identity in enumerate(found) if not peers or rank in peers}
    if len(different) > 1:
        raise ValueError(
            "ChildAdamW: all ranks must have one child network, or their replicas drift apart (got "
            f"{len(different)} different ones, each perhaps chosen by the rank's own data); merge the ranks' "
            "FisherAccumulators by all_reduce() before choosing, or load one file on all ranks; ranks with different "
            "models, as the stages of a pipeline, need sharded parameters (fully_shard)"
        )


def refuse_interrupted() -> NoReturn:
    """Raises the RuntimeError for a step after one that was taken in part."""
    raise RuntimeError(
        "ChildAdamW.step: an earlier step was taken in part, so that parameters and state do not belong together; load "
        "the model's and the optimizer's checkpoint, by load_state_dict, before the next step"
    )


def check_params(param_groups: list[dict[str, Any]], masked: bool) -> None:
    """Raises for parameters that no step can take.

    That is ValueError for lazily negated ones, those that share memory, and DTensors of partial sums; TypeError for
    those of other dtypes, such as complex ones, unless they are frozen: torch gives integers and bools no gradient.

    It does so also for a group that ZeroRedundancyOptimizer adds, the last one, if more than plain AdamW is asked for.
    """
    _check_not_dealt_out(param_groups[-1], masked)
    params = [param for group in param_groups for param in group["params"]]
    check_once(param_groups)
    _check_dtypes(params)
    plain = [param for param in params if type(param) in PLAIN_TENSORS]
    _check_no_lazy_negation(plain)
    check_apart((param for param in plain if param.requires_grad), "parameters")  # a step looks at what it writes
    for param in params:
        if is_sharded(param):
            from ..ops.shards import local_part

            local_part(param)
    check_stored(param_groups)


def check_stored(param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if the state of a parameter cannot be stored as its group says, or it cannot be rounded."""
    for group in param_groups:
        for param in group["params"]:
            if not param.requires_grad:  # it may have any dtype; a step looks again
                continue
            kind = kind_of(group.get("state", "float32"), param)
            if is_sharded(param) and is_rounded(kind, group.get("rounding", "nearest"), param):
                from .placed import check_placed

                check_placed(param, kind)


def _check_not_dealt_out(group: dict[str, Any], masked: bool) -> None:
    """Raises ValueError if ZeroRedundancyOptimizer gives a group to more than plain AdamW.

    Each rank has an optimizer of a part of the parameters then. Their numbers in it, by which random bits are drawn,
    and the norm of their gradients depend on how they were dealt out. Checkpoints pass none of our checks, and hold the
    child network as an object, which `weights_only=True` refuses.
    """
    plain: dict[str, Any] = {"reserve_p": 1, "max_grad_norm": None, "state": "float32", "rounding": "nearest"}
    got = [f"{name}={group[name]}" for name in plain if group.get(name, plain[name]) != plain[name]]
    if masked:
        got.append("a child network")
    if got and _called_from("torch.distributed.optim.zero_redundancy_optimizer"):
        raise ValueError(
            "ChildAdamW: ZeroRedundancyOptimizer deals out whole parameters, which is supported with reserve_p=1, "
            "max_grad_norm=None, state='float32' and rounding='nearest' alone (got "
            f"{', '.join(got)}); shard the model by torch's fully_shard instead"
        )


def _called_from(module: str) -> bool:
    """Returns whether a function of a module has called this one, directly or not."""
    frame = sys._getframe(1) if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def _check_dtypes(params: list[Tensor]) -> None:
    """Raises TypeError for a parameter that could have a gradient, and is of a dtype that no step takes."""
    for param in params:
        if param.requires_grad and param.dtype not in DTYPES:
            raise TypeError(
                "ChildAdamW: parameters must be float32, float64, bfloat16 or float16 (got one of "
                f"{param.dtype} and shape {tuple(param.shape)}); freeze it, or hold a complex one as "
                "torch.nn.Parameter(torch.view_as_real(x)) and compute with torch.view_as_complex of that"
            )


def _check_no_lazy_negation(params: list[Tensor]) -> None:
    """Raises ValueError for a lazily negated view, such as x.conj().imag, whose memory holds the negated values."""
    for param in params:
        if param.is_neg():
            raise ValueError(
                "ChildAdamW: parameters must not be lazily negated views, such as x.conj().imag (got one of shape "
                f"{tuple(param.shape)}); pass resolve_neg() of it"
            )
