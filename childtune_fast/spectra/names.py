"""Which parameters and layers of two models are the same."""

from collections import Counter
from collections.abc import Iterable, Mapping

from ..child.names import plain_name


def matched(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Returns {name in one model: name of the same in another}, for those that both have.

    What wrappers put into names makes no difference, and neither does the path to one model within the other, such as
    "bert." or sentence-transformers' "0.auto_model.".

    Raises:
        ValueError: one model's names fit several parts of the other equally well.
    """
    here, there = _by_plain_name(names), _by_plain_name(others)
    (inside, paths), (of_others, their_paths) = _paths(here, there), _paths(there, here)
    if inside >= of_others:
        path = _only(paths)
        return {here[path + name]: other for name, other in there.items() if path + name in here}
    path = _only(their_paths)
    return {name: there[path + plain] for plain, name in here.items() if path + plain in there}


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Returns {name without what wrappers put into it: name}; names that are equal without it are left as they are."""
    found = list(names)
    count = Counter(map(plain_name, found))
    return {plain if count[plain := plain_name(name)] == 1 else name: name for name in found}


def _paths(names: Iterable[str], inner: Mapping[str, str]) -> tuple[int, list[str]]:
    """Returns how many names are one of the inner model's behind the same path, and the paths for which most are."""
    found: Counter[str] = Counter({"": 0})
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in inner:
                found["".join(f"{part}." for part in parts[:i])] += 1
    most = max(found.values())
    return most, [path for path, count in found.items() if count == most]


def _only(paths: list[str]) -> str:
    """Returns "" if that is among the paths, else the only one; raises ValueError if there are several."""
    if "" not in paths and len(paths) > 1:
        raise ValueError(
            f"names of one model must fit one part of the other (got '{paths[0]}' and '{paths[1]}', which fit as well "
            "as each other); pass models with the same names, such as the whole ones"
        )
    return "" if "" in paths else paths[0]
