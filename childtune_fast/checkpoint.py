"""Checkpoints of an AdamW with masks: saved with what they need to resume, loaded from and for torch's own AdamW."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_options, check_type
from .child_state import FINGERPRINT, Masks, adopt, saved_masks
from .mask import MASK_VERSION, check_seed
from .packed_mask import fingerprint
from .state import check_saved_state, dense_state, restored_state


class CheckpointedAdamW(torch.optim.AdamW):
    """The checkpoints of ChildAdamW, which is its only subclass.

    Attributes:
        child_masks: {parameter: its mask} of the child network; {} without one.
    """

    child_masks: Masks

    def state_dict(self) -> dict[str, Any]:
        """Returns the checkpoint, as torch does; with a child network, its masks and their fingerprint are in it."""
        state_dict = super().state_dict()
        if self.child_masks:
            identity = fingerprint(self.child_masks.values())
            for group in state_dict["param_groups"]:
                group[FINGERPRINT] = identity
        return state_dict

    def dense_state_dict(self) -> dict[str, Any]:
        """Returns the checkpoint as torch.optim.AdamW has it: state of every weight, zero outside the child network."""
        dense = self.state_dict()
        masks = self._by_number(dense["param_groups"], self.child_masks)
        states = {i: dense_state(state, masks.get(i)) for i, state in dense["state"].items()}
        for group in dense["param_groups"]:
            group.pop(FINGERPRINT, None)
        return {**dense, "state": {i: state for i, state in states.items() if state}}

    def _by_number(self, packed_groups: list[dict[str, Any]], of: Mapping[Tensor, Any]) -> dict[int, Any]:
        """What `of` has for each parameter, by the parameter's number in a checkpoint."""
        numbers = itertools.chain.from_iterable(group["params"] for group in packed_groups)
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return {i: of[p] for i, p in zip(numbers, params, strict=True) if p in of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.AdamW.

        State keeps its precision: it is float32 for bfloat16 and float16 parameters too (torch casts it to the
        parameter's dtype), and it is copied, never shared with `state_dict`. What a checkpoint of torch.optim.AdamW
        does not hold (`reserve_p`, `seed`, ...) stays as it is.

        A checkpoint with a child network makes it this optimizer's. One without, loaded into an optimizer with a child
        network, gives the values inside it.

        Raises:
            ValueError: as torch does; also for a checkpoint whose masks were placed by another version, are damaged, or
                are not those of the child network that this optimizer was built with.
            TypeError: it is no checkpoint, or a state is no tensor. Whatever is raised, nothing has been loaded then.
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
            self.child_masks = masks
            self.defaults["seed"] = self.param_groups[0]["seed"]  # of groups that are added later

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
        """Saved groups with what they lack, and with what a checkpoint does not decide, taken from the present ones."""
        groups = []
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
