"""Names of parameters inside and outside of wrappers, such as torch.compile's and DistributedDataParallel's.

A wrapped model has other names for the same parameters: "module._orig_mod.blocks.0.weight" for "blocks.0.weight".
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# What torch.compile, activation checkpointing and FSDP call the module inside of them.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """Returns a parameter's name without what wrappers put into it, "module" at its beginning included.

    So DDP, DataParallel and AveragedModel call the module inside of them. Further in, it is a usual name.
    """
    *modules, last = _unwrapped(name).split(".")
    while modules and modules[0] == "module":
        del modules[0]
    return ".".join([*modules, last])


def _unwrapped(name: str) -> str:
    """Returns a parameter's name without what only wrappers put into it."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPED), last])


def renamed(tensors: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Returns a mapping with the names that another model has for the same parameters, in the same order.

    A name that the other model has stays. Any other becomes the one that is equal to it without wrappers, if only one
    name in each model is, and else stays too. A model may have a part that is called "module", and so that is taken for
    a wrapper's only if nothing else explains the name.

    Args:
        tensors: {name in one model: anything}.
        names: the names in the other model.
    """
    others = set(names)
    here = [name for name in tensors if isinstance(name, str)]  # a user's mapping may have other keys
    new: dict[str, str] = {}
    for plain in (plain_name, _unwrapped):  # the later wins
        of_here, of_others = _single(here, plain), _single(others, plain)
        new |= {of_here[key]: of_others[key] for key in of_here.keys() & of_others.keys()}
    new |= {name: name for name in here if name in others}
    return {new.get(name, name): tensor for name, tensor in tensors.items()}


def _single(names: Iterable[str], plain: Callable[[str], str]) -> dict[str, str]:
    """Returns {plain name: name} for the plain names that only one of the names has."""
    count = Counter(map(plain, names))
    return {plain(name): name for name in names if count[plain(name)] == 1}
