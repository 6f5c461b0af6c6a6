"""What an object adds up while it computes losses, kept apart from a pass that is no training."""

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def in_copies(owner: object, without: Iterable[str] = ()) -> Iterator[None]:
    """Lets an object count and collect in copies while the context lasts, and gives it the originals back.

    Trainers and modules add up tokens, accuracies or losses as they compute a loss, to log their means later, as
    SFTTrainer does. Copied are the attributes that are numbers, tensors of no dimensions, and dicts, lists, sets and
    deques, with those in them.

    Args:
        owner: the object.
        without: names of attributes that are left alone.
    """
    kept = {name: value for name, value in vars(owner).items() if name not in without and _is_record(value)}
    try:
        vars(owner).update({name: _copied(value) for name, value in kept.items()})
        yield
    finally:
        vars(owner).update(kept)


def _is_record(value: Any) -> bool:
    return isinstance(value, (int, float, MutableMapping, list, set, deque)) or _is_sum(value)


def _is_sum(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad


def _copied(value: Any) -> Any:
    if _is_sum(value):
        return value.clone()
    if not isinstance(value, (MutableMapping, list, set, deque)):
        return value
    new = copy.copy(value)
    if isinstance(new, MutableMapping):
        for key in new:
            new[key] = _copied(new[key])
    elif not isinstance(new, set):
        for i, entry in enumerate(new):
            new[i] = _copied(entry)
    return new
