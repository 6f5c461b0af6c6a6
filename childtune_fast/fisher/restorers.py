"""Functions that restore something each: what they are given by, and how all of them are run whatever goes wrong."""

import warnings
from collections.abc import Callable
from typing import Any

Restorers = list[tuple[str, Callable[[], object]]]  # what is restored, for a warning, and the function that does it


def run_all(restorers: Restorers) -> None:
    """Runs every function; one warning names what could not be restored."""
    failed = [f"{what} ({error})" for what, restore in restorers if (error := _error_of(restore))]
    if failed:
        warnings.warn(
            f"Fisher scores: the model must be left as it was (could not restore {'; '.join(failed)}); the scores are "
            "valid, but load the model anew",
            stacklevel=5,  # the caller of estimate_fisher
        )


def _error_of(restore: Callable[[], object]) -> str:
    """Runs a function; returns the error that it raised as text, or ""."""
    try:
        restore()
    except Exception as error:  # an override of train(), or torch for a tensor that was moved, may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def contents(held: Any) -> Callable[[], None]:
    """Returns a function that gives a dictionary or a set the entries of now: the same objects, in the same order."""
    before = held.copy()

    def put_back() -> None:
        if isinstance(held, set):
            same = held == before
        else:
            same = list(held) == list(before) and all(held[name] is value for name, value in before.items())
        if not same:
            held.clear()
            held.update(before)

    return put_back
