"""Checks of public arguments, which raise a sentence that says what was required and what was given."""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FilePath = str | os.PathLike[str]
PLAIN_TENSORS = (Parameter, Tensor)  # a tensor of any other class may be a DTensor
Selector = str | re.Pattern[str] | Callable[[str], bool] | None  # selects parameters by their names


def check_type(what: str, value: Any, kind: type | tuple[type, ...], noun: str) -> None:
    """Raises TypeError, with the sentence "`what` must be `noun`", unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {noun} (got {type(value).__name__})")


def check_model(model: Any, what: str = "model") -> None:
    """Raises TypeError unless `model` is a torch.nn.Module; the error calls the argument `what`."""
    check_type(what, model, nn.Module, "a torch.nn.Module")


def check_seed(seed: Any) -> int:
    """Returns the seed as an unsigned integer of 64 bits.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed needs more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer of 64 bits, or None for torch's own (got {type(seed).__name__})")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit in 64 bits (got {seed})")
    return seed % (1 << 64)


def predicate(selector: Selector, what: str) -> Callable[[str], object]:
    """Returns a selector that is not None as a function of a parameter's name.

    Args:
        selector: a predicate over names, or a regular expression that is searched in them.
        what: the argument's name, with which an error begins.

    Raises:
        ValueError: the selector is a string, but no regular expression.
        TypeError: the selector is neither a string, nor a pattern, nor a function.
    """
    if isinstance(selector, (str, re.Pattern)):
        try:
            return re.compile(selector).search
        except re.error as error:
            raise ValueError(f"{what} must be a regular expression (got {selector!r}: {error})") from None
    if not callable(selector):
        raise TypeError(
            f"{what} must be a predicate over parameter names, a regex or None (got {type(selector).__name__})"
        )
    return selector


def is_sharded(param: Tensor) -> "TypeGuard[DTensor]":
    """Returns whether a parameter is a DTensor, without importing torch.distributed."""
    return type(param) not in PLAIN_TENSORS and hasattr(type(param), "placements")
