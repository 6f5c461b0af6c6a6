"""Checkpoints of an AdamW with masks, which can also be saved for and loaded from torch.optim.AdamW."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_seed, check_type
from ..ops.packed_mask import Masks, PackedMask, fingerprint
from ..ops.random_mask import MASK_VERSION
from .collect import check_options, settle_options
from .state import check_saved_state, dense_state, restored_state

FINGERPRINT = "child_fingerprint"  # key in each param group of a checkpoint with a child network


class CheckpointedAdamW(torch.optim.AdamW):
    """The checkpoints of ChildAdamW, which is its only subclass.

    Attributes:
        child_masks: {parameter: its mask} of the child network; {} without one.
    """

    child_masks: Masks

    def state_dict(self) -> dict[str, Any]:
        """Returns a checkpoint in torch's format; with a child network, it holds the masks and their fingerprint."""
        state_dict = super().state_dict()
        if self.child_masks:
            identity = fingerprint(self.child_masks.values())
            for group in state_dict["param_groups"]:
                group[FINGERPRINT] = identity
        return state_dict

    def dense_state_dict(self) -> dict[str, Any]:
        """Returns a checkpoint for torch.optim.AdamW, without masks.

        Its averages have the parameters' shapes, and are zero outside the child network.
        """
        dense = self.state_dict()
        masks = self._by_number(dense["param_groups"], self.child_masks)
        states = {i: dense_state(state, masks.get(i)) for i, state in dense["state"].items()}
        for group in dense["param_groups"]:
            group.pop(FINGERPRINT, None)
            if group["decay"] == "child":
                group["decay"] = "auto"  # the optimizer that loads it may have a child network or none
        return {**dense, "state": {i: state for i, state in states.items() if state}}

    def _by_number(self, packed_groups: list[dict[str, Any]], of: Mapping[Tensor, Any]) -> dict[int, Any]:
        """Returns the values of `of`, which maps parameters, by the parameters' numbers in a checkpoint."""
        numbers = itertools.chain.from_iterable(group["params"] for group in packed_groups)
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return {i: of[p] for i, p in zip(numbers, params, strict=True) if p in of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.AdamW.

        The state keeps its precision: it is float32 for bfloat16 and float16 parameters too, where torch would cast it
        to the parameter's dtype. It is copied and never shared with `state_dict`. Options that a checkpoint of
        torch.optim.AdamW does not hold, such as `reserve_p` and `seed`, stay as they are.

        If the checkpoint has a child network, this optimizer takes it. If only this optimizer has one, it takes the
        values inside the child network from the checkpoint's dense state.

        Args:
            state_dict: what `state_dict` or `dense_state_dict` of a ChildAdamW, or `state_dict` of a torch.optim.AdamW,
                returned; it is only read.

        Raises:
            ValueError: the checkpoint does not fit the parameter groups, its masks were made by another version of the
                random masks, are damaged, or are not those of the child network that this optimizer was built with.
                Nothing has been loaded then.
            TypeError: `state_dict` is no checkpoint, or a state is no tensor. Nothing has been loaded then.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            for state in state_dict["state"].values():
                check_saved_state(state)
            loaded.update(state_dict, param_groups=self._complete_groups(state_dict["param_groups"]))
            return loaded

        def after(_: torch.optim.Optimizer) -> None:
            params = self._by_number(loaded["param_groups"], {p: p for g in self.param_groups for p in g["params"]})
            masks = adopt(self.child_masks, saved_masks(params, loaded))
            for i, param in params.items():
                if i in loaded["state"] or param in masks:
                    self.state[param] = restored_state(param, loaded["state"].get(i, {}), masks.get(param))
            for group in self.param_groups:
                group.pop(FINGERPRINT, None)
                settle_options(group, bool(masks))
            self.child_masks = masks
            self.defaults["seed"] = self.param_groups[0]["seed"]  # groups that are added later take it

        check_type("load_state_dict: state_dict", state_dict, Mapping, "what an optimizer's state_dict() returned")
        check_type("load_state_dict: 'state' in state_dict", state_dict.get("state"), Mapping, "a mapping")
        check_type("load_state_dict: 'param_groups' in state_dict", state_dict.get("param_groups"), list, "a list")
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        present = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = present
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _complete_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the saved groups, completed by the present ones with what a checkpoint lacks or does not decide."""
        groups: list[dict[str, Any]] = []
        for i, saved in enumerate(saved_groups):
            present = self.param_groups[min(i, len(self.param_groups) - 1)]
            kept = {"foreach", "fused", "capturable", "differentiable"} & present.keys()
            group = {**{k: v for k, v in present.items() if k != "params"}, **saved, **{k: present[k] for k in kept}}
            check_options(group, groups[0]["seed"] if groups else check_seed(group["seed"]))
            if group["mask_version"] != MASK_VERSION:
                raise ValueError(
                    f"ChildAdamW.load_state_dict: the checkpoint's masks are of version {group['mask_version']}, "
                    f"those of this childtune_fast of version {MASK_VERSION}; resume with the release that saved it"
                )
            groups.append(group)
        return groups


def saved_masks(params: Mapping[int, Tensor], state_dict: dict[str, Any]) -> Masks:
    """Returns {parameter: mask} of a checkpoint; {} if it has no child network.

    Args:
        params: {number in the checkpoint: parameter of the optimizer}.
        state_dict: the checkpoint, of a ChildAdamW or of another optimizer.

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
    """Returns the checkpoint's masks, or if it has none, those that the optimizer was built with.

    Args:
        present: {parameter: mask} of the optimizer's child network; {} without one.
        saved: {parameter: mask} of the checkpoint's child network; {} without one.

    Raises:
        ValueError: both have a child network, and the two differ.
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
