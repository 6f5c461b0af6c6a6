"""The compiled module: whether a value of `backend` asks for it, and how it is found when it is first needed.

The module is prebuilt by `pip install`, else built just in time (`jit.py`). The outcome, success or failure, is kept
for the process.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, cast, get_args

import torch

from ..arguments import shown
from . import BackendError, build

Backend = Literal["auto", "native", "torch"]
CHOICES = get_args(Backend)


class Native(NamedTuple):
    """The compiled module, or why there is none.

    Attributes:
        module: the compiled module; None if there is none.
        origin: "prebuilt" or "built just in time"; "" without a module.
        notes: the failures, one line for each attempt; empty if the first attempt succeeded.
    """

    module: ModuleType | None
    origin: str
    notes: list[str]


def resolve(requested: Backend) -> ModuleType | None:
    """Returns the compiled module that a request for a backend asks for; None stands for pure torch.

    Args:
        requested: "native" raises if there is no compiled module; "torch" does not look for one; "auto" takes the
            compiled module if there is one, else pure torch with one warning in the process. The environment variable
            CHILDTUNE_BACKEND, if set, replaces "auto".

    Raises:
        ValueError: the argument or CHILDTUNE_BACKEND is none of these three words.
        BackendError: "native" was requested and there is no compiled module.
    """
    choice = chosen(requested)
    if choice == "torch":
        return None
    if choice == "native":
        return load_native()
    native = find_native()
    if native.module is None:
        warn_once(f"{_sentence(native.notes)}\nThe slower pure-torch backend, with the same results, runs instead.")
    return native.module


def chosen(requested: Backend) -> Backend:
    """Returns `requested`, or if it is "auto" the value of CHILDTUNE_BACKEND; ValueError if that is no backend."""
    choice = check(requested, "backend")
    if choice == "auto":
        choice = check(os.environ.get("CHILDTUNE_BACKEND") or "auto", "the environment variable CHILDTUNE_BACKEND")
    return choice


def load_native() -> ModuleType:
    """Returns the compiled module: prebuilt, else from the cache of earlier builds, else built now.

    Raises:
        BackendError: all three fail. The first failure is kept for the process and raised again.
        ValueError: CHILDTUNE_FORCE_JIT is neither 0 nor 1.
    """
    native = find_native()
    if native.module is None:
        raise BackendError(_sentence(native.notes))
    return native.module


def find_native() -> Native:
    """Returns the compiled module, or why there is none.

    Raises:
        ValueError: CHILDTUNE_FORCE_JIT is neither 0 nor 1.
    """
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
            pass  # usual in a source tree, so it is no failure to note
        except (BackendError, ImportError) as error:
            notes.append(f"the prebuilt binary is unusable ({error})")
    from . import jit

    try:
        return Native(jit.load(), "built just in time", notes)
    except BackendError as error:
        return Native(None, "", [*notes, str(error)])


def _force_jit() -> bool:
    value = os.environ.get("CHILDTUNE_FORCE_JIT") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable CHILDTUNE_FORCE_JIT must be 0 or 1 (got {value!r})")
    return value == "1"


def _load_prebuilt() -> ModuleType:
    """Imports and returns `childtune_fast._native`.

    Raises:
        ModuleNotFoundError: there is no such module.
        BackendError: it was made from other sources than those of this package, or its record is missing.
    """
    name = f"childtune_fast.{build.MODULE}"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    try:
        record = json.loads(Path(spec.origin).with_name(build.RECORD).read_text(encoding="utf-8"))
        found = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BackendError(f"{spec.origin} has no readable {build.RECORD} beside it; run `pip install` again") from None
    if found != build.fingerprint():
        raise BackendError(f"{spec.origin} was made from other sources than this package's; run `pip install` again")
    return importlib.import_module(name)


def check(choice: str, what: str) -> Backend:
    """Returns `choice`, or raises ValueError if it is no backend; the error begins with `what`."""
    if choice not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, CHOICES))} (got {shown(choice)})")
    return cast(Backend, choice)


def _sentence(notes: list[str]) -> str:
    return "childtune_fast has no native backend: " + "; ".join(notes)


@functools.cache
def warn_once(message: str) -> None:
    """Warns at the line of the user's code, once in the process for each message."""
    warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """Returns the `stacklevel`, for a warning of the caller, of the first line outside of this package and torch."""
    inside = tuple(str(folder) + os.sep for folder in (build.PACKAGE, Path(torch.__file__).parent))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
