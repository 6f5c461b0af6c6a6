"""The kernels of each GPU: device code from one of three ways, loaded once and kept for the process.

No GPU has run them yet: so they serve where they are asked for, by backend="native" or CHILDTUNE_BACKEND=native, and
"auto" leaves parameters on a GPU to the fallback.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import backend as backends
from .step_group import StepGroup


class Gpu(NamedTuple):
    """The kernels of a GPU, or why there are none.

    Attributes:
        kernels: the compiled module's GpuKernels; None if they could not be had.
        origin: the way that led to them; empty without kernels.
        notes: what went wrong on the other ways, one line each.
    """

    kernels: Any
    origin: str
    notes: list[str]


def kernels_of(device: int) -> Any:
    """Returns the kernels of a GPU.

    Raises:
        BackendError: they cannot be had. The first failure holds for the process.
    """
    gpu = find(device)
    if gpu.kernels is None:
        raise backends.BackendError(
            f"childtune_fast has no kernels for GPU {device}: {'; '.join(gpu.notes)}; repair one of these ways, or "
            'choose backend="torch"'
        )
    return gpu.kernels


def find(device: int) -> Gpu:
    """Returns the kernels of a GPU, compiled and loaded at its first call; for lack of them it does not raise."""
    if device not in _found:
        with _lock:  # threads wait for the one that compiles
            if device not in _found:
                _found[device] = _look(device)
    return _found[device]


_found: dict[int, Gpu] = {}
_lock = threading.Lock()


def _look(device: int) -> Gpu:
    from ._cuda_image import images  # here: it loads what only compiling needs

    if torch.version.cuda is None:
        return Gpu(None, "", ["this torch was built without CUDA"])
    native = backends.find_native().module
    if native is None:
        return Gpu(None, "", ["there is no native backend to launch them"])
    notes: list[str] = []
    for origin, make in images(torch.cuda.get_device_capability(device)):
        with _noting(origin, notes):
            return Gpu(native.GpuKernels(device, make()), origin, notes)
    return Gpu(None, "", notes)


@contextlib.contextmanager
def _noting(origin: str, notes: list[str]) -> Iterator[None]:
    """Notes what goes wrong on one way, in the words of whoever refuses: a compiler, or the driver."""
    try:
        yield
    except (backends.BackendError, RuntimeError) as error:
        notes.append(f"{origin}: {error}")


def step(device: int, groups: list[StepGroup]) -> None:
    """Steps groups on a GPU, on torch's current stream there; returns before the GPU has done it."""
    kernels_of(device).step(groups, torch.cuda.current_stream(device).cuda_stream)
