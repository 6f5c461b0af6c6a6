"""Checkpoints of an AdamW with masks, which can also be saved for and loaded from torch.optim.AdamW."""

import contextlib
import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type
from ..native.load import Backend
from ..ops.packed_mask import Masks
from ..ops.random_mask import MASK_VERSION
from ..ops.rounding import ROUNDING_VERSION
from ..ops.step import StepMemory
from ..ops.undisturbed import undisturbed
from .agreed import FINGERPRINT, agreed_masks
from .checks import check_stored
from .collect import OWN_OPTIONS, check_values, settle_options
from .groups import check_groups, check_states
from .kinds import kind_of
from .masks import MaskBook
from .restored import dense_state, restored_state
from .saved import check_checkpoint, states_of_params
from .state import copied, saved_state

_HOOKS = ("state_dict_pre_hooks", "state_dict_post_hooks")  # how the names of torch's attributes end
# Keys in each param group: what of random bits they stand for, and the version of it that this release draws.
VERSIONS = {"mask_version": ("masks", MASK_VERSION), "rounding_version": ("random roundings", ROUNDING_VERSION)}


class CheckpointedAdamW(torch.optim.AdamW):
    """The checkpoints of ChildAdamW, which is its only subclass."""

    backend: Backend
    _book: MaskBook  # the same object all along, for wrappers of the optimizer
    _step_memory: StepMemory

    @property
    def child_masks(self) -> Masks:
        """{parameter: its PackedMask} of the parameters in the groups that the child network masks; {} without one."""
        check_groups(self.param_groups)
        return self._masks() or {}

    @contextlib.contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """Makes the optimizer what it was if an exception ends the context, in which signals' handlers wait."""
        check_type("ChildAdamW: defaults", self.defaults, MutableMapping, "a dict")
        state, param_groups, book = self.state, self.param_groups, copy.copy(self._book)
        groups = list(param_groups)
        mappings = (self.defaults, *groups, self.state)
        contents = [(mapping, dict(mapping)) for mapping in mappings if isinstance(mapping, MutableMapping)]
        with undisturbed():
            try:
                yield
            except BaseException:
                self.state, self.param_groups = state, param_groups
                if isinstance(param_groups, list):
                    param_groups[:] = groups
                for mapping, content in contents:
                    mapping.clear()
                    mapping.update(content)
                self._book.become(book)
                raise

    def _masks(self, *, anew: bool = False) -> Masks | None:
        """Returns the masks of the parameters in the groups, as `MaskBook.read` does; None without a child network."""
        if not self._book.active:
            return None
        masks = self._book.read(self.param_groups, anew=anew)
        for group in self.param_groups:
            group[FINGERPRINT] = self._book.fingerprint
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Returns a checkpoint in torch's format; with a child network, it holds copies of the masks.

        A parameter that is masked has its mask in it, also before its first step. The state of a masked DTensor is
        dense: DTensors of its shape and placements, zeros outside the child network, and a bool one for its mask; they
        are copies, and take what AdamW's state would. State of parameters that are in no group is left out. All other
        tensors are shared with the optimizer, as in torch.

        Raises:
            ValueError: a parameter has been replaced, and it cannot be told whether it is masked.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self._saved()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _saved(self) -> dict[str, Any]:
        """Returns what `state_dict` does, without hooks; changes nothing, so that no interrupt can."""
        check_groups(self.param_groups)
        check_states(self.state, self.param_groups)
        masks = self._masks() or {}
        present = {param for group in self.param_groups for param in group["params"]}
        states = {key: state for key, state in self.state.items() if not isinstance(key, Tensor) or key in present}
        saved = torch.optim.AdamW.state_dict(self._without_hooks(state=states))
        for i, param in self._by_number(saved["param_groups"], {param: param for param in masks}).items():
            saved["state"][i] = saved_state(saved["state"].get(i, {}), param, masks[param])
        return saved

    def _without_hooks(self, **changed: Any) -> "CheckpointedAdamW":
        """Returns this optimizer as another object, with some attributes changed and without hooks on checkpoints."""
        twin = object.__new__(type(self))
        hooks: dict[str, Any] = {name: OrderedDict() for name in self.__dict__ if name.endswith(_HOOKS)}
        twin.__dict__.update(self.__dict__, **hooks, **changed)
        return twin

    def dense_state_dict(self) -> dict[str, Any]:
        """Returns a checkpoint for torch.optim.AdamW, without masks.

        Its averages have the parameters' shapes, and are zero outside the child network.
        """
        dense = self.state_dict()
        masks = self._by_number(dense["param_groups"], self._masks() or {})
        states = dense["state"] | {i: dense_state(state, masks.get(i)) for i, state in states_of_params(dense).items()}
        for group in dense["param_groups"]:
            group.pop(FINGERPRINT, None)
            if group.get("decay") == "child":
                group["decay"] = "auto"  # the optimizer that loads it may have a child network or none
        return {**dense, "state": {i: state for i, state in states.items() if state}}

    def _by_number(self, packed_groups: list[dict[str, Any]], of: Mapping[Tensor, Any]) -> dict[int, Any]:
        """Returns the values of `of`, which maps parameters, by the parameters' numbers in a checkpoint."""
        numbers = itertools.chain.from_iterable(group["params"] for group in packed_groups)
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return {i: of[p] for i, p in zip(numbers, params, strict=True) if p in of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.AdamW.

        The state is stored as this optimizer's groups say, whatever the checkpoint's is: with `state="float32"` it is
        float32 for bfloat16 and float16 parameters too, where torch would cast it to the parameter's dtype. It is
        copied and never shared with `state_dict`. Options that a checkpoint of torch.optim.AdamW does not hold, such as
        `reserve_p` and `seed`, stay as they are.

        If the checkpoint has a child network, this optimizer takes it; one that was built with `child=` must have the
        same. If only this optimizer has one, it takes the values inside the child network from the checkpoint's dense
        state. Parameters may be whole or sharded, whatever they were when the checkpoint was saved; then all ranks must
        load it.

        Args:
            state_dict: what `state_dict` or `dense_state_dict` of a ChildAdamW, or `state_dict` of a torch.optim.AdamW,
                returned; it is only read.

        Raises:
            ValueError: the checkpoint does not fit the parameter groups, its masks were made by another version of the
                random masks, are damaged, or are not those of the child network that this optimizer was built with.
                Nothing has been loaded then.
            TypeError: `state_dict` is no checkpoint, or a state is no tensor. Nothing has been loaded then.
        """
        check_type("load_state_dict: state_dict", state_dict, Mapping, "what an optimizer's state_dict() returned")
        check_groups(self.param_groups)
        with self._whole_or_not():
            state_dict = {**state_dict}  # which hooks may write to
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                changed = before(self, state_dict)
                state_dict = state_dict if changed is None else changed
            self._load(state_dict)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)
        self._step_memory.interrupted = False

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Does what `load_state_dict` does, without hooks; raises amid it."""
        check_checkpoint(state_dict)
        loaded = {**state_dict, "param_groups": self._complete_groups(state_dict["param_groups"])}
        saved = states_of_params(loaded)
        # torch would cast the parameters' states, so they go another way.
        others = {key: value for key, value in loaded["state"].items() if key not in saved}
        twin = self._without_hooks()
        torch.optim.AdamW.load_state_dict(twin, {**loaded, "state": others})
        self.state, self.param_groups = twin.state, twin.param_groups
        params = self._by_number(loaded["param_groups"], {p: p for g in self.param_groups for p in g["params"]})
        check_stored(self.param_groups)
        words = {param: group["state"] for group in self.param_groups for param in group["params"]}
        bound = self._book.child is not None
        masks, dense = agreed_masks(self._masks(), bound, params, loaded)
        for i in (i for i in params if i in saved):  # in one order on all ranks, which may gather
            param = params[i]
            kind = kind_of(words[param], param)
            state = restored_state(param, saved[i], (masks or {}).get(param), dense, kind)
            if state:
                self.state[param] = state
        if masks is not None and not bound:
            self._book.adopt(masks, self.param_groups)
        self._masks(anew=True)
        for options in (self.defaults, *self.param_groups):
            settle_options(options, masks is not None)
        seed = next((group["seed"] for group in self.param_groups), self.defaults["seed"])
        self.defaults["seed"] = seed  # groups that are added later take it

    def __getstate__(self) -> dict[str, Any]:
        own = {"backend": self.backend, "_book": self._book, "_interrupted": self._step_memory.interrupted}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_memory = StepMemory(interrupted=self.__dict__.pop("_interrupted", False))
        self.__dict__.setdefault("_book", MaskBook())
        for group in self.param_groups:
            for name in ("reserve_p", *OWN_OPTIONS, *VERSIONS, FINGERPRINT):
                if name in self.defaults:
                    group.setdefault(name, self.defaults[name])
            settle_options(group, self._book.active)

    def _complete_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the saved groups, completed by the present ones with what a checkpoint lacks or does not decide."""
        groups: list[dict[str, Any]] = []
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"load_state_dict: the checkpoint has a different number of parameter groups (got {len(saved_groups)}, "
                f"for {len(self.param_groups)} of the optimizer); make the optimizer with the groups that were saved"
            )
        for i, saved in enumerate(saved_groups):
            present = self.param_groups[i]
            kept = {"foreach", "fused", "capturable", "differentiable", "state"} & present.keys()
            saved = copied(saved, f"param_groups[{i}]")
            group = {**{k: v for k, v in present.items() if k != "params"}, **saved, **{k: present[k] for k in kept}}
            group[FINGERPRINT] = saved.get(FINGERPRINT)  # of no other child network than the checkpoint's
            check_values(group, groups[0]["seed"] if groups else None)
            _check_versions(group)
            groups.append(group)
        return groups


def _check_versions(group: Mapping[str, Any]) -> None:
    """Raises ValueError if a group's masks, or its roundings, would be drawn otherwise than before it was saved."""
    for name, (what, known) in VERSIONS.items():
        version = group.get(name)
        if not isinstance(version, int) or version != known:
            raise ValueError(
                f"ChildAdamW.load_state_dict: the checkpoint's {what} are of version {version}, "
                f"those of this childtune_fast of version {known}; resume with the release that saved it"
            )
