"""Restores random states: the global ones, and those of the generators that a DataLoader or a module holds."""

import contextlib
import functools
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np  # for its global random state, which a user's data set or model may draw from
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from .restorers import Restorers, contents

# What is not looked into: it holds no generator, or more than one wants to walk over.
_CLOSED = (type, types.ModuleType, Tensor, np.ndarray, str, bytes, int, float, complex)
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)  # a class of the user's own may do anything when it is read
# Of a DataLoader, and of torchdata's StatefulDataLoader.
_NO_ITERATOR = {"_iterator": None, "_initial_iter_for_state_dict": False}
_LONGEST = 100  # entries of a list or dictionary that is looked into; a longer one holds data
_MOST = 2000  # objects that are looked into, nearest first


@functools.cache
def _generators() -> tuple[type, ...]:
    """Returns the classes of random generators; not at import, since numpy loads its own only when they are named."""
    return torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator


def global_states() -> Restorers:
    """Returns what restores the random states of Python, numpy, and torch, on the CPU and on devices in use."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    states: Restorers = [
        ("Python's random state", partial(random.setstate, python)),
        ("numpy's random state", partial(np.random.set_state, numpy)),
        ("torch's random state", partial(torch.set_rng_state, cpu)),
    ]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            name = device.__name__.removeprefix("torch.").upper()
            states.append((f"{name}'s random states", partial(device.set_rng_state_all, device.get_rng_state_all())))
    if torch.backends.mps.is_available():
        states.append(("MPS's random state", partial(torch.mps.set_rng_state, torch.mps.get_rng_state())))
    return states


def module_states(model: nn.Module) -> Restorers:
    """Returns what restores the states of the generators that are attributes of a model's modules."""
    values = (value for module in model.modules() for value in vars(module).values())
    return held_states(value for value in values if isinstance(value, _generators()))


def held_states(holders: Iterable[Any], without: Iterable[Any] = ()) -> Restorers:
    """Returns what restores the random generators that objects hold: the objects and their states.

    Generators of torch, numpy and Python are found in attributes, short lists and dictionaries, partial functions and
    closures, at any depth. Of DataLoaders and samplers, all attributes are restored: their epoch may seed the order,
    and their iterator keeps workers.

    Args:
        holders: what is looked into, such as a DataLoader.
        without: objects that are not looked into (default: none).
    """
    restorers: Restorers = []
    for thing in _reached(holders, without):
        name = f"random state in {type(thing).__name__}"
        if isinstance(thing, _generators()):
            restorers += [(name, restore) for restore in _state_of(thing)]
        elif (held := _attributes(thing)) is not None:
            keeps_all = isinstance(thing, (DataLoader, Sampler))
            restorers.append((name, contents(held) if keeps_all else _generators_in(held)))
    return restorers


def set_iterators_aside(holders: Iterable[Any], without: Iterable[Any] = ()) -> None:
    """Lets DataLoaders begin with new iterators and workers: the states of those that they keep cannot be restored.

    What `held_states` returned before puts the old ones back. The arguments are the same.
    """
    for thing in _reached(holders, without):
        if isinstance(thing, DataLoader):
            held = vars(thing)
            held.update({name: value for name, value in _NO_ITERATOR.items() if name in held})


def _reached(holders: Iterable[Any], without: Iterable[Any]) -> list[Any]:
    """Returns all objects that can be reached from some, those too, at most `_MOST`, the nearest ones first."""
    closed = {id(thing) for thing in without}
    found: dict[int, Any] = {}
    waiting = deque(holders)
    while waiting and len(found) < _MOST:
        thing = waiting.popleft()
        if thing is None or id(thing) in found or id(thing) in closed or isinstance(thing, _CLOSED):
            continue
        found[id(thing)] = thing
        waiting.extend(_inside(thing))
    return list(found.values())


def _inside(thing: Any) -> Iterable[Any]:
    """Returns the objects that an object holds."""
    if isinstance(thing, _generators()):
        return ()
    if type(thing) in _CONTAINERS:
        values = thing.values() if isinstance(thing, dict) else thing
        return list(values) if len(thing) <= _LONGEST else ()
    if isinstance(thing, (types.MethodType, types.BuiltinMethodType)):
        return (thing.__self__, getattr(thing, "__func__", None))
    if isinstance(thing, partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    return [*_closure(thing), *(_attributes(thing) or {}).values()]


def _closure(thing: Any) -> Iterator[Any]:
    """Yields the values that a function took from the one around it."""
    for cell in (isinstance(thing, types.FunctionType) and thing.__closure__) or ():
        with contextlib.suppress(ValueError):  # it has no value
            yield cell.cell_contents


def _attributes(thing: Any) -> dict[str, Any] | None:
    """Returns the dictionary of an object's attributes; None if it has none."""
    try:
        held = vars(thing)
    except Exception:  # TypeError, or whatever an object raises that stands for another one
        return None
    return held if isinstance(held, dict) else None


def _state_of(generator: Any) -> Iterable[Callable[[], object]]:
    """Returns the function that restores a generator's state; none if it has no state, as random.SystemRandom."""
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return [partial(setattr, generator, "state", generator.state)]
    if isinstance(generator, random.SystemRandom):
        return []
    if isinstance(generator, random.Random):
        return [partial(generator.setstate, generator.getstate())]
    return [partial(generator.set_state, generator.get_state())]


def _generators_in(held: dict[str, Any]) -> Callable[[], None]:
    """Returns a function that restores the attributes that are generators, or have become some."""
    before = dict(held)

    def put_back() -> None:
        for name in held.keys() | before.keys():
            now, then = held.get(name), before.get(name)
            if now is not then and isinstance(now if isinstance(now, _generators()) else then, _generators()):
                held[name] = then
            if name not in before and isinstance(now, _generators()):
                del held[name]

    return put_back
