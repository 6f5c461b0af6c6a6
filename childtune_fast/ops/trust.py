"""Whether "auto" takes the kernels of a GPU: once they have proved themselves on it, or on the user's word.

Training does not wait for a proof. Results have the same bits either way, so torch steps until there is a verdict, and
then the kernels do (`prover.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from ..native import CudaError, gpu, load

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
                _proof_of(device)
        else:
            kernels_of(device, choice)


ATTEMPTS = 3  # at loading kernels that there is no memory for

_settled: dict[int, Any] = {}  # the kernels of each GPU about which all is known, or None
_proofs: dict[int, Proof] = {}
_attempts: dict[int, int] = {}
_lock = threading.RLock()


def _proof_of(device: int) -> Proof:
    """Returns the running or finished proof of a GPU, which the first call starts."""
    from .prover import Proof

    with _lock:
        running = _proofs.get(device)
        if running is None or running.pid != os.getpid():  # a thread does not survive a fork
            running = _proofs[device] = Proof(device)
            running.start()
        return running


def _settle(device: int, wait: bool) -> None:
    """Puts a GPU's kernels, or None, into `_settled`, if all is known."""
    if setting() == "off" or torch.version.cuda is None or load.resolve("auto") is None:  # nothing could launch them
        _settled[device] = None
        return
    try:
        _load(device, wait)
    except CudaError as error:
        _attempts[device] = _attempts.get(device, 0) + 1
        if error.code != gpu.OUT_OF_MEMORY:
            raise
        if _attempts[device] == ATTEMPTS:  # until then, the next step may find more memory
            _give_up(device, str(error))


def _load(device: int, wait: bool) -> None:
    """Does what `_settle` does, if CHILDTUNE_GPU is not "off"; raises CudaError if kernels cannot be loaded now."""
    if setting() == "trust":
        found = gpu.find(device)
        if found.kernels is None:
            _give_up(device, "there are none: " + "; ".join(found.notes))
        _settled[device] = found.kernels
        return
    running = _proof_of(device)
    if wait or setting() == "prove":
        running.join()
    if running.found is not None and not gpu.is_capturing(device):  # a graph that is captured lets nothing be loaded
        from .prover import judged

        with _lock:
            if device not in _settled:
                _settled[device] = judged(device, running.found)


def _give_up(device: int, cause: str) -> None:
    from .prover import warn

    warn(device, cause)
    _settled[device] = None
