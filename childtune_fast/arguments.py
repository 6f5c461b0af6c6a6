"""Checks of public arguments, which raise a sentence that says what was required and what was given."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn, strided
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FilePath = str | os.PathLike[str]
_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")
_LONG = 40  # characters of a value that an error may well show
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
            raise ValueError(f"{what} must be a regular expression (got {shown(selector)}: {error})") from None
    if not callable(selector):
        raise TypeError(
            f"{what} must be a predicate over parameter names, a regex or None (got {type(selector).__name__})"
        )
    return selector


def is_sharded(param: Tensor) -> "TypeGuard[DTensor]":
    """Returns whether a parameter is a DTensor, without importing torch.distributed."""
    return type(param) not in PLAIN_TENSORS and hasattr(type(param), "placements")


def has_memory(tensor: Tensor) -> bool:
    """Returns whether a strided tensor's storage is as large as its elements need: it may have been freed or shrunk.

    A tensor of zeros that autograd has not made yet (`torch._efficientzerotensor`) has none.
    """
    if tensor.numel() == 0:
        return not tensor._is_zerotensor()
    storage = tensor.untyped_storage()
    if (tensor.storage_offset() + reach(tensor)) * tensor.element_size() > storage.nbytes():
        return False
    try:
        return tensor.is_meta or storage.data_ptr() != 0
    except RuntimeError:  # "invalid python storage"
        return False


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor is of a class that computes in its own way, such as DTensor, mostly with other tensors.

    What it says of its own memory means nothing then.
    """
    return type(tensor) not in PLAIN_TENSORS and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def lost_memory(value: Any) -> bool:
    """Returns whether a value is a tensor with memory of its own whose values cannot be read any more."""
    if not isinstance(value, Tensor) or is_wrapper(value):
        return False
    return value.layout == strided and not (value.is_meta or value.is_nested or has_memory(value))


def resolved(tensor: Tensor) -> Tensor:
    """Returns a tensor without lazy negation, which leaves the negated values in memory.

    One whose values cannot be read any more is returned as it is, so that whoever looks at its memory refuses it.
    """
    return tensor.resolve_neg() if tensor.is_neg() and not lost_memory(tensor) else tensor


def reach(tensor: Tensor) -> int:
    """Returns how many elements there are from a tensor's first in memory to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def number(options: Mapping[str, Any], name: str, least: float = -math.inf) -> float:
    """Returns a number in a group's options.

    Args:
        options: the group's options.
        name: which of them, a number or a tensor of one element; this waits for one on a GPU.
        least: what it must be at least; without it, it may be negative (default: -inf).

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite or less than `least`.
    """
    value = options[name]
    found = value if type(value) is float else as_float(name, value)
    if not least <= found < math.inf or found == -math.inf:
        range_ = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"ChildAdamW: {name} must be a finite number{range_} (got {found})")
    return found


def both_betas(options: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the two betas in a group's options; raises as `number` does, and ValueError if one is not in [0, 1)."""
    first, second = two_betas(options["betas"])
    if not (type(first) is float and type(second) is float):  # the usual case takes no more than this
        first, second = as_float("betas[0]", first), as_float("betas[1]", second)
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0):
        i, beta = (1, second) if 0.0 <= first < 1.0 else (0, first)
        raise ValueError(f"ChildAdamW: betas[{i}] must lie in [0, 1) (got {beta})")
    return first, second


def check_flags(options: Mapping[str, Any]) -> None:
    """Raises TypeError if a flag in a group's options is a tensor, which may say neither yes nor no."""
    for name in _FLAGS:
        if isinstance(options.get(name), Tensor):
            raise TypeError(f"ChildAdamW: {name} must be True or False (got {brief(options[name])})")


def two_betas(betas: Any) -> tuple[Any, Any]:
    """Returns both of AdamW's betas as they are; raises TypeError if these are not two things."""
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise TypeError(f"ChildAdamW: betas must be two numbers in [0, 1) (got {brief(betas)})") from None
    return first, second


def as_float(name: str, value: Any) -> float:
    """Returns a number, or a tensor of one, as a float; raises TypeError, which calls it `name`, if it is none."""
    try:
        if not isinstance(value, (str, bytes, bytearray)) and not lost_memory(value):  # which float() would read
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"ChildAdamW: {name} must be a number, or a tensor of one (got {brief(value)})")


def brief(value: Any) -> str:
    """Returns a value in a few words: its type, and what it holds unless that may be long."""
    found = shown(value)
    name = type(value).__name__
    plain = found in (name, "None") or isinstance(value, Tensor)
    return (found if isinstance(value, Tensor) else name) if plain or len(found) > _LONG else f"{name} {found}"


def shown(value: Any) -> str:
    """Returns what an error can say of any value: a tensor's shape and dtype, as its values may have lost their memory.

    Plain values, and short lists of them, are as `repr` has them; of anything else, the type is told.
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    plain = (str, bytes, bool, int, float, complex, type(None), torch.dtype)
    items = value if isinstance(value, (list, tuple)) else (value,)
    if len(items) <= _LONG and all(isinstance(item, (*plain, re.Pattern)) for item in items):
        found = repr(value)
        return found if len(found) <= 2 * _LONG else f"{found[: 2 * _LONG]}..."
    return type(value).__name__
