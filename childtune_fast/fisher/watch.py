"""Modes that watch operations, for what decides whether examples can be told apart: random numbers, and selection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RATES = ("dropout_p", "dropout")  # the arguments of operations that drop elements inside of themselves


class Mode(TorchDispatchMode):
    """A mode that sees every operation, under which compiled functions stay compiled."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Returns True: under any other mode, torch.compile gives up its functions for good."""
        return True


class Constants(Mode):
    """Makes every random number that torch draws in the context the same one, so that two passes can be compared.

    Masks of dropout then keep everything. A model stays in its mode, in which it may do more than draw numbers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)  # operators of higher order have none
        names = [argument.name for argument in schema.arguments] if schema else []
        rates = [name for name in _RATES if name in names]
        if func is torch.ops.aten.native_dropout.default:
            rates = ["p"]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if rates:
            return func(**{**given, **dict.fromkeys(rates, 0.0)})
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and isinstance(result, Tensor):
            result.fill_(0.5)
        return result


class Selections(Mode):
    """Calls a function whenever an operation returns as many elements as the values of its inputs say.

    How many of them belong to an example cannot be told then from the shapes.
    """

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in getattr(func, "tags", ()) and not _is_by_numbers(func, args):
            self._note()
        return func(*args, **(kwargs or {}))


def _is_by_numbers(func: Any, args: Any) -> bool:
    """Returns whether an operation takes elements by their numbers alone, as in `x[torch.tensor([0, 2])]`."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])
