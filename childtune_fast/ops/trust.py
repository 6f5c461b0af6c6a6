"""Whether "auto" takes the kernels of a GPU: once they have proved themselves on it, or on the user's word.

Training does not wait for a proof. Results have the same bits either way, so torch steps until there is a verdict, and
then the kernels do (`prover.py`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from ..native import gpu, load

if TYPE_CHECKING:
    from .prover import Proof

Setting = Literal["auto", "prove", "trust", "off"]
SETTINGS = get_args(Setting)
_VARIABLE = "CHILDTUNE_GPU"


def setting() -> Setting:
    """Returns what the environment variable CHILDTUNE_GPU says "auto" does with kernels on GPUs.

    "auto", also if it is not set, takes them once they have proved themselves, and does not wait for that; "prove"
    waits; "trust" takes them without a proof; "off" never takes them.

    Raises:
        ValueError: it is none of these words.
    """
    value = os.environ.get(_VARIABLE) or "auto"
    if value not in SETTINGS:
        allowed = ", ".join(map(repr, SETTINGS))
        raise ValueError(f"the environment variable {_VARIABLE} must be one of {allowed} (got {value!r})")
    return cast(Setting, value)


def kernels_of(device: int, choice: load.Backend, wait: bool = False) -> Any:
    """Returns the kernels that compute what lies on a GPU, the compiled module's GpuKernels, or None if torch does.

    Args:
        device: number of the GPU.
        choice: the backend, CHILDTUNE_BACKEND considered: "native" takes the kernels without a proof, "auto" as
            `setting` says.
        wait: whether "auto" waits for the verdict (default: False).

    Raises:
        BackendError: `choice` is "native", and there are no kernels for the GPU.
        ValueError: CHILDTUNE_GPU is invalid.
    """
    if choice != "auto":
        return gpu.load_kernels(device) if choice == "native" else None
    if device not in _settled:
        _settle(device, wait)
    return _settled.get(device)


def prepare(devices: Iterable[int], choice: load.Backend) -> None:
    """Loads the kernels of GPUs, or begins to prove them, before training fills their memory; raises as `kernels_of`.

    Args:
        devices: numbers of GPUs.
        choice: the backend, as in `kernels_of`.
    """
    for device in devices:
        if choice == "auto" and setting() in ("auto", "prove") and torch.version.cuda is not None:
            if device not in _settled:
                with contextlib.suppress(RuntimeError):  # torch cannot use the GPU: the first step says so
                    _proof_of(device)
        else:
            kernels_of(device, choice)


_PAUSE, _ATTEMPTS = 5.0, 3  # seconds between attempts at loading kernels that there is no memory for, and how many

_settled: dict[int, Any] = {}  # the kernels of each GPU about which all is known, or None
_proofs: dict[int, Proof] = {}
_failures: dict[int, list[float]] = {}  # when there was no memory for the kernels of a GPU
_lock = threading.RLock()


def _proof_of(device: int) -> Proof:
    """Returns the running or finished proof of a GPU, which the first call starts."""
    from .prover import Proof

    with _lock:
        running = _proofs.get(device)
        if running is None or running.pid != os.getpid():  # a thread does not survive a fork
            running = Proof(device)
            running.start()
            _proofs[device] = running
        return running


def _settle(device: int, wait: bool) -> None:
    """Puts a GPU's kernels, or None, into `_settled`, if all is known; then warns, if there is a reason."""
    failures = _failures.setdefault(device, [])
    if failures and time.monotonic() < failures[-1] + _PAUSE:
        return
    kernels, warning = None, ""
    if setting() != "off" and torch.version.cuda is not None and load.resolve("auto") is not None:
        from . import proof, prover

        try:
            found = _trusted(device) if setting() == "trust" else _proved(device, wait)
        except Exception as error:
            if proof.lacks_memory(error):
                failures.append(time.monotonic())  # a later step may find more
                if len(failures) < _ATTEMPTS:
                    return
            found = None, prover.not_used(device, str(error))
        if found is None:
            return
        kernels, warning = found
    _settled[device] = kernels
    if warning:
        load.warn_once(warning)


def _trusted(device: int) -> tuple[Any, str]:
    """Returns a GPU's kernels, or None and what to warn of."""
    from .prover import not_used

    found = gpu.find(device)
    why = "" if found.kernels is not None else not_used(device, "there are none: " + "; ".join(found.notes))
    return found.kernels, why


def _proved(device: int, wait: bool) -> tuple[Any, str] | None:
    """Returns the kernels that are proved, or None and what to warn of; None as long as nothing is known."""
    from .prover import judged

    running = _proof_of(device)
    if wait or setting() == "prove":
        running.join()
    if running.found is None or gpu.is_capturing(device):  # a graph that is captured lets nothing be loaded
        return None
    with _lock:
        return (_settled[device], "") if device in _settled else judged(device, running.found)
