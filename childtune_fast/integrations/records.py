"""What an object adds up while it computes losses, kept apart from a pass that is no training."""

import contextlib
import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_MAPPINGS, list, set, deque)


@contextlib.contextmanager
def in_copies(owner: object, without: Iterable[str] = ()) -> Iterator[None]:
    """Lets an object count and collect in copies while the context lasts, and gives it its attributes back.

    Trainers and modules add up tokens, accuracies or losses as they compute a loss, to log their means later, as
    SFTTrainer does. Copied are Python's own dicts, lists, sets and deques, and in them such containers and tensors of
    no dimensions. An attribute with another value has the same object again afterwards; a new one is removed.

    Args:
        owner: the object.
        without: names of attributes that are left alone, such as data sets.
    """
    left = set(without)
    kept = {name: value for name, value in vars(owner).items() if name not in left}
    memo: dict[int, Any] = {}
    try:
        vars(owner).update({name: _copied(value, memo) for name, value in kept.items()})
        yield
    finally:
        for name in vars(owner).keys() - kept.keys() - left:
            del vars(owner)[name]
        vars(owner).update(kept)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Returns a copy of a record, the same one for the same record, or the value itself if it is none."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad:
        return memo.setdefault(id(value), value.clone())
    if type(value) not in _CONTAINERS:
        return value
    new = memo[id(value)] = copy.copy(value)
    if isinstance(new, _MAPPINGS):
        for key in list(new):
            new[key] = _copied(new[key], memo)
    elif not isinstance(new, set):
        for i, entry in enumerate(list(new)):
            new[i] = _copied(entry, memo)
    return new
