"""Places: where in a model the masked parameters are, by which an optimizer recognises them."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter


class Places:
    """The modules that hold named parameters of a model, and their attributes there; it keeps none of them alive.

    So a parameter that is replaced in its module, as `load_state_dict(assign=True)` and sharding do, is found again,
    and one that is no longer there is missed. References survive neither pickling nor a copy, unless one
    `copy.deepcopy` copies the model, too, and before.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Finds the places of the parameters that `model.named_parameters()` calls `names`."""
        params = dict(model.named_parameters())
        holders: dict[Tensor, tuple[weakref.ref[nn.Module], str]] = {}
        for module in model.modules():
            for attribute, param in module._parameters.items():
                if param is not None:
                    holders.setdefault(param, (weakref.ref(module), attribute))
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._holders = {name: holders[params[name]] for name in names if params[name] in holders}
        # For a module that was made only to hold them. A tensor of another class may not have weak references: torch
        # could not convert it in its module.
        self._params = {name: weakref.ref(params[name]) for name in names if type(params[name]) is Parameter}

    def current(self) -> dict[str, Tensor | None]:
        """Returns {name: the parameter that is there now, or None}; a name whose place is not known is left out."""
        found = {name: (reference(), attribute) for name, (reference, attribute) in self._holders.items()}
        return {
            name: None if module is None else module._parameters.get(attribute)
            for name, (module, attribute) in found.items()
        }

    def names(self) -> dict[Tensor, str]:
        """Returns {parameter: name} of those that are there now, and of those that were, whoever holds them now."""
        were = {name: reference() for name, reference in self._params.items()}
        return {param: name for of in (were, self.current()) for name, param in of.items() if param is not None}

    def parameters(self) -> list[Parameter]:
        """Returns all parameters that the model has now; none if the model is gone, or not known."""
        model = None if self._model is None else self._model()
        return [] if model is None else list(model.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None, "_holders": {}, "_params": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Places":
        copied = object.__new__(Places)
        model = None if self._model is None else memo.get(id(self._model()))
        holders = {name: (memo.get(id(reference())), key) for name, (reference, key) in self._holders.items()}
        params = {name: memo.get(id(reference())) for name, reference in self._params.items()}
        copied._model = None if model is None else weakref.ref(model)
        copied._holders = {name: (weakref.ref(m), key) for name, (m, key) in holders.items() if m is not None}
        copied._params = {name: weakref.ref(param) for name, param in params.items() if param is not None}
        return copied
