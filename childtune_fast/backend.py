"""The choice of backend: the compiled kernels if they can be had, else pure torch. Nothing loads before it is needed.

The compiled module is taken prebuilt (`pip install` made it), else built just in time (`_jit.py`). What came of it,
success or failure, holds for the process.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import _build

CHOICES = ("auto", "native", "torch")


class BackendError(RuntimeError):
    """The native backend cannot be had; the message names the cause and the remedy."""


class Native(NamedTuple):
    """The compiled module, or why there is none.

    Attributes:
        module: the compiled module; None if it could not be had.
        origin: "prebuilt" or "built just in time"; empty without a module.
        notes: what went wrong on the way, one line per attempt; empty if the first one succeeded.
    """

    module: ModuleType | None
    origin: str
    notes: list[str]


def resolve(requested: str) -> ModuleType | None:
    """Returns the compiled module that a request for a backend stands for; None stands for pure torch.

    Args:
        requested: "native" (raises if it cannot be had), "torch", or "auto" (native, else torch with one warning per
            process). Where the code says "auto", the environment variable CHILDTUNE_BACKEND decides, if it is set.

    Raises:
        ValueError: another word was given, here or in CHILDTUNE_BACKEND.
        BackendError: "native" was asked for and cannot be had.
    """
    choice = chosen(requested)
    if choice == "torch":
        return None
    if choice == "native":
        return load_native()
    native = find_native()
    if native.module is None:
        _warn_once(_sentence(native.notes))
    return native.module


def chosen(requested: str) -> str:
    """Returns what a request comes to: itself, or for "auto" what CHILDTUNE_BACKEND says; raises as `resolve` does."""
    choice = check(requested, "backend")
    if choice == "auto":
        choice = check(os.environ.get("CHILDTUNE_BACKEND") or "auto", "the environment variable CHILDTUNE_BACKEND")
    return choice


def load_native() -> ModuleType:
    """Returns the compiled module: prebuilt, else from the cache of earlier builds, else built now.

    Raises:
        BackendError: it cannot be had. The first failure holds for the process and is raised again.
        ValueError: CHILDTUNE_FORCE_JIT is neither 0 nor 1.
    """
    native = find_native()
    if native.module is None:
        raise BackendError(_sentence(native.notes))
    return native.module


def find_native() -> Native:
    """Returns the compiled module or the causes of its absence; for lack of a compiler it does not raise."""
    with _lock:  # threads wait for the one that loads
        return _find_native()


_lock = threading.RLock()


@functools.cache
def _find_native() -> Native:
    notes: list[str] = []
    if not _force_jit():
        try:
            return Native(_load_prebuilt(), "prebuilt", notes)
        except ModuleNotFoundError:
            pass  # the usual case in a source tree: nothing worth telling
        except (BackendError, ImportError) as error:
            notes.append(f"the prebuilt binary is unusable ({error})")
    from . import _jit

    try:
        return Native(_jit.load(), "built just in time", notes)
    except BackendError as error:
        return Native(None, "", [*notes, str(error)])


def _force_jit() -> bool:
    value = os.environ.get("CHILDTUNE_FORCE_JIT") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable CHILDTUNE_FORCE_JIT must be 0 or 1 (got {value!r})")
    return value == "1"


def _load_prebuilt() -> ModuleType:
    """Imports `childtune_fast._native`, if it was made from the very sources of this package."""
    name = f"{__package__}.{_build.MODULE}"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    try:
        record = json.loads(Path(spec.origin).with_name(_build.RECORD).read_text(encoding="utf-8"))
        found = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BackendError(
            f"{spec.origin} has no readable {_build.RECORD} beside it; run `pip install` again"
        ) from None
    if found != _build.fingerprint():
        raise BackendError(f"{spec.origin} was made from other sources than this package's; run `pip install` again")
    return importlib.import_module(name)


def check(choice: str, where: str) -> str:
    """Returns `choice`, or raises ValueError if it is no backend; `where` says in the error who asked for it."""
    if choice not in CHOICES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, CHOICES))} (got {choice!r})")
    return choice


def _sentence(notes: list[str]) -> str:
    return "childtune_fast has no native backend: " + "; ".join(notes)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"{message}\nThe slower pure-torch backend, with the same results, runs instead.", stacklevel=4)
