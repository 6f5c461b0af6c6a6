"""Batches of any nesting: the tensors in mappings, lists and tuples."""

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns the batch with `change(tensor)` in the place of each tensor, always in the same order.

    Mappings, lists, tuples and named tuples are gone through, and copied; anything else that is no tensor stays as it
    is.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)  # keeps the class: a transformers BatchEncoding also has attributes
        for key, value in batch.items():
            changed[key] = map_tensors(value, change)
        return changed
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """Returns every tensor in the batch, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def with_tensors(batch: Any, tensors: list[Tensor]) -> Any:
    """Returns the batch with `tensors`, in the order of `tensors_of`, in the place of its own."""
    remaining = iter(tensors)
    return map_tensors(batch, lambda _: next(remaining))


def examples_in(tensors: list[Tensor], index: int) -> int:
    """Returns how many examples the tensors of batch number `index` hold: their size in dimension 0.

    Raises:
        ValueError: there is no tensor, one has no dimensions, or sizes differ.
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        raise ValueError(
            f"estimate_fisher: batch {index}: with per_example=True every tensor must have the examples in dimension 0 "
            f"(got {shapes}); change the batch, or use batches of one example and per_example=False"
        )
    return sizes.pop()
