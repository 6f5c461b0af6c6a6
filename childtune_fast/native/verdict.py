"""Verdicts on the kernels of a GPU: whether they have proved themselves there, kept on disk beside their code.

A verdict holds for one image of device code on one GPU, with one driver, torch and version of this package: if any of
these changes, its key does, and the kernels are proved anew.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from . import build, kept, load
from .jit import cache_folder

Word = Literal["good", "bad", "refused", "unknown"]
CLOCKS_DIFFER = datetime.timedelta(days=1)
BAD_FOR = datetime.timedelta(days=7)  # a fault may have been the machine's: after that, the kernels are proved again
LOCK_TIMEOUT = 180.0  # seconds to wait for another process's proof; after that, both prove, which is safe


class Verdict(NamedTuple):
    """What a proof has found.

    Attributes:
        word: "good" if every bit was right; "bad" if one was not, or a kernel failed; "refused" if the driver does not
            load the device code, so that another way to make it is tried; "unknown" if the proof could not be held, or
            not to its end, which is not kept.
        cause: the case that differed and how, or why nothing is known; "" for "good".
        date: when the proof ended, in UTC, as in ISO 8601.
        seconds: how long it took.
    """

    word: Word
    cause: str = ""
    date: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.word == "good":
            return f"proved on {self.date} in {self.seconds:.0f} s"
        return f"not proved: {self.cause}" + f" (on {self.date})" * bool(self.date)


def made(word: Word, cause: str, seconds: float) -> Verdict:
    """Returns a verdict of now."""
    return Verdict(word, cause, datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"), seconds)


def facts_of(properties: Any) -> dict[str, Any]:
    """Returns what a verdict on kernels depends on, but for their device code.

    Args:
        properties: what `torch.cuda.get_device_properties` returns for the GPU.
    """
    return {
        "GPU": properties.name,
        "capability": [properties.major, properties.minor],
        "UUID": str(getattr(properties, "uuid", "")),
        "driver": _driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "childtune_fast": build.version(),
        "host code": build.fingerprint(),
        "cases": _digest_of_cases(),
    }


def _digest_of_cases() -> str:
    """Returns the digest of the Python code that runs kernels and proves them."""
    digest = hashlib.sha256()
    for path in sorted((build.PACKAGE / "ops").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """Returns the driver's version: Linux's driver tells its own, the library everywhere that of its CUDA."""
    native = load.find_native().module
    known = "" if native is None else f"CUDA {native.cuda_driver_version()}"
    with contextlib.suppress(OSError):
        known += ", " + Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").strip()
    return known


def with_image(facts: dict[str, Any], image: bytes) -> dict[str, Any]:
    """Returns what a verdict on kernels depends on, their device code included."""
    return {**facts, "device code": hashlib.sha256(image).hexdigest()}


def stored(facts: dict[str, Any]) -> Verdict | None:
    """Returns the verdict that was kept under these facts; None if there is none, or it is damaged or too old."""
    content = kept.read(_path(facts, "json"))
    try:
        found = json.loads(content or b"")
        verdict = Verdict(**found["verdict"])
        age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(verdict.date)
        str(verdict)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    if found["facts"] != facts or verdict.word not in get_args(Word) or verdict.word == "unknown":
        return None
    too_old = verdict.word != "good" and not -CLOCKS_DIFFER < age < BAD_FOR
    return None if too_old or not isinstance(verdict.cause, str) else verdict


def keep(facts: dict[str, Any], verdict: Verdict) -> bool:
    """Keeps a verdict under these facts, unless it is "unknown"; returns whether it will be found there."""
    if verdict.word == "unknown":
        return True
    content = json.dumps({"facts": facts, "verdict": verdict._asdict()}, indent=1)
    written = kept.write(_path(facts, "json"), content.encode())
    return written and stored(facts) is not None  # what all users may write, as on some file systems, is not trusted


def one_at_a_time(facts: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which no other process of this machine proves the same."""
    return kept.one_at_a_time(_path(facts, "lock"), LOCK_TIMEOUT)


def _path(facts: dict[str, Any], ending: str) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"verdict-{key}.{ending}"
