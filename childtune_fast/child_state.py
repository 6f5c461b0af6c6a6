"""The child network inside an optimizer: which of its parameters are masked, and what a checkpoint says of it."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .collect import is_sharded
from .packed_mask import Masks, PackedMask, fingerprint
from .state import mark_child

if TYPE_CHECKING:
    from .child_network import ChildNetwork
    from .optimizer import ChildAdamW

FINGERPRINT = "child_fingerprint"  # in each param group of a checkpoint with a child network


def saved_masks(params: Mapping[int, Tensor], state_dict: dict[str, Any]) -> Masks:
    """Returns the masks in a checkpoint, {} if it has none.

    Args:
        params: by their numbers in the checkpoint.
        state_dict: of a ChildAdamW, or of another optimizer.

    Raises:
        ValueError: a mask is damaged or does not fit its parameter.
    """
    masks = {}
    for i, state in state_dict["state"].items():
        bits = state.get("child_mask") if isinstance(state, dict) else None
        if bits is not None and i in params:
            if not isinstance(bits, Tensor):
                raise ValueError(f"load_state_dict: state 'child_mask' must be a tensor (got {type(bits).__name__})")
            masks[params[i]] = PackedMask(params[i].shape, bits.detach().to(params[i].device, copy=True))
    expected = state_dict["param_groups"][0].get(FINGERPRINT) if state_dict["param_groups"] else None
    found = fingerprint(masks.values()) if masks else None
    if expected != found:
        raise ValueError(
            f"load_state_dict: the masks of the checkpoint's child network must have the fingerprint {expected} that "
            f"was saved with them (got {found}); the checkpoint is damaged, or only a part of it was passed"
        )
    return masks


def adopt(present: Masks, saved: Masks) -> Masks:
    """Returns the masks to go on with: the checkpoint's, else those that the optimizer was built with.

    Raises:
        ValueError: both have a child network, and not the same.
    """
    present = {param: mask.to(param.device) for param, mask in present.items()}  # the model may have moved
    if not saved:
        return present
    same = present.keys() == saved.keys() and all(torch.equal(m.bits, saved[p].bits) for p, m in present.items())
    if present and not same:
        raise ValueError(
            "load_state_dict: the optimizer's child network must be the checkpoint's (got fingerprints "
            f"{fingerprint(present.values())} and {fingerprint(saved.values())}); build the optimizer without child=, "
            "which takes the checkpoint's, or with the child network that was saved"
        )
    return present or saved


def check_ranks_agree(masks: Masks) -> None:
    """Raises ValueError on all ranks of an initialised process group if they have not one child network."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, fingerprint(masks.values()) if masks else None)
    if len(set(found)) > 1:
        raise ValueError(
            "ChildAdamW: all ranks must have one child network, or their replicas drift apart (got "
            f"{len(set(found))} different ones, each perhaps chosen by the rank's own data); merge the ranks' "
            "FisherAccumulators before choosing, or load one file on all ranks"
        )


def masks_of(child: "ChildNetwork", group: dict[str, Any]) -> Masks:
    """The child network's masks of a group's parameters, on their devices.

    Raises:
        ValueError: one of these parameters is sharded.
    """
    names = group.get("param_names") or itertools.repeat(None)
    found = {param: child.mask_of(param, name) for param, name in zip(group["params"], names)}  # noqa: B905
    masks = {param: mask.to(param.device) for param, mask in found.items() if mask is not None}
    if any(map(is_sharded, masks)):
        raise ValueError("ChildAdamW: child= does not support sharded parameters (DTensor); shard after training")
    return masks


def replace_child(optimizer: "ChildAdamW", child: "ChildNetwork") -> None:
    """Gives an optimizer that has a child network another one, between two steps.

    The state of every parameter that either masks begins anew, step count included; that of others stays.

    Raises:
        ValueError: the child network masks no parameter of the optimizer, or not the same ones on all ranks. Nothing
            has been changed then.
    """
    masks: Masks = {}
    for group in optimizer.param_groups:
        masks.update(masks_of(child, group))
    if not masks:
        raise ValueError(
            f"ChildAdamW: a child network must mask a parameter of the optimizer (got one of {len(child.packed)} "
            "others); make it from the model whose parameters these are"
        )
    check_ranks_agree(masks)
    for param in optimizer.child_masks.keys() | masks.keys():
        optimizer.state.pop(param, None)
    for param, mask in masks.items():
        mark_child(optimizer.state[param], mask)
    optimizer.child_masks, optimizer._child = masks, child
