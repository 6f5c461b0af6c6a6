"""Places: where in a model the masked parameters are, by which an optimizer recognises them."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..arguments import is_sharded
from .names import plain_name

_Holder = tuple["weakref.ref[nn.Module]", str]  # a module, and the attribute by which it holds a parameter


class Places:
    """The modules that hold named parameters of a model, and their attributes there; it keeps none of them alive.

    So a parameter that is replaced in its module, as `load_state_dict(assign=True)` and sharding do, is found again,
    and so is one whose module is replaced by another of the same name. One that is no longer there is missed.
    References survive neither pickling nor a copy, unless one `copy.deepcopy` copies the model, too, and before.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Finds the places of the parameters that `model.named_parameters()` calls `names`."""
        params = dict(model.named_parameters())
        holders: dict[Tensor, list[_Holder]] = {}  # several of a tied parameter
        for module in model.modules():
            for attribute, param in module._parameters.items():
                if param is not None:
                    holders.setdefault(param, []).append((weakref.ref(module), attribute))
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._plain_names = frozenset(map(plain_name, params))
        self._holders = {name: holders.get(params[name], []) for name in names}
        self._params = {name: weakref.ref(params[name]) for name in names if _may_be_referred_to(params[name])}

    def current(self) -> dict[str, list[Tensor]]:
        """Returns {name: the parameters that are there now}: none where one is gone, several where a tie was undone.

        A name that a copy knows without its model is left out.
        """
        model = None if self._model is None else self._model()
        modules = None if model is None else set(model.modules())
        by_name = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
        held: dict[str, list[Tensor]] = {}
        for name, holders in self._holders.items():
            alive = [(module, key) for reference, key in holders if (module := reference()) is not None]
            there = [m._parameters.get(key) for m, key in alive if modules is None or m in modules]
            held[name] = [param for param in there if param is not None]
            if there and name in by_name and all(param is not by_name[name] for param in there):
                by_name = {}  # layers have changed places, so that names mislead
        missing = {name: by_name[name] for name, params in held.items() if not params and name in by_name}
        return {**held, **{name: [param] for name, param in missing.items()}}

    def names(self) -> dict[Tensor, str]:
        """Returns {parameter: name} of those that are there now, and of those that were, whoever holds them now."""
        found = {param: name for name, params in self.current().items() for param in params}
        were = {name: reference() for name, reference in self._params.items()}
        return {**found, **{param: name for name, param in were.items() if param is not None}}

    def parameters(self) -> list[Parameter]:
        """Returns all parameters that the model has now; none if the model is gone, or not known."""
        model = None if self._model is None else self._model()
        return [] if model is None else list(model.parameters())

    def had(self, name: str | None) -> bool:
        """Returns whether the model had a parameter of that name, wrappers aside, when this was made."""
        return name is not None and plain_name(name) in self._plain_names

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None, "_plain_names": self._plain_names, "_holders": {}, "_params": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Places":
        copied = object.__new__(Places)
        model = None if self._model is None else memo.get(id(self._model()))
        copied._model = None if model is None else weakref.ref(model)
        copied._plain_names = self._plain_names
        copied._holders, current = {}, self.current()
        for name, holders in self._holders.items():
            modules = [(memo.get(id(reference())), key) for reference, key in holders]
            known = [(weakref.ref(module), key) for module, key in modules if module is not None]
            if known or model is not None or not current[name]:  # what was missed before is missed in the copy
                copied._holders[name] = known
        params = {name: memo.get(id(reference())) for name, reference in self._params.items()}
        copied._params = {name: weakref.ref(param) for name, param in params.items() if param is not None}
        return copied


def _may_be_referred_to(param: Tensor) -> bool:
    """Returns whether weak references to a parameter do no harm: torch swaps no tensors that have them.

    It converts those of other classes by swapping, and all if it is told to.
    """
    return type(param) is Parameter and not torch.__future__.get_swap_module_params_on_conversion()


def device_of_mask(param: Tensor) -> torch.device:
    """Returns where a parameter's mask is kept: with the parameter, or on the CPU if it is sharded, for it is whole."""
    return torch.device("cpu") if is_sharded(param) else param.device
