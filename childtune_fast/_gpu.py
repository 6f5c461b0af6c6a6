"""The kernels of each GPU: device code from one of three ways, loaded once and kept for the process.

No GPU has run them yet: so they serve where they are asked for, by backend="native" or CHILDTUNE_BACKEND=native, and
"auto" leaves parameters on a GPU to the fallback.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def asked_for(requested: str) -> bool:
    """Whether a request for a backend means these kernels too: until a GPU has run them, "auto" does not."""
    return backends.chosen(requested) == "native"


def kernels_for(*tensors: Tensor) -> Any | None:
    """Returns the kernels of the GPU that contiguous tensors lie on; None if it is none, or they are not asked for.

    Raises:
        BackendError: they are asked for and cannot be had.
    """
    if not (tensors[0].is_cuda and asked_for("auto")):
        return None
    device = tensors[0].device
    if not all(tensor.device == device and tensor.is_contiguous() for tensor in tensors):
        return None
    return kernels_of(device.index)


def stream_of(device: int) -> int:
    """Returns torch's current stream on a GPU, as the kernels take it."""
    return torch.cuda.current_stream(device).cuda_stream


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


def step(
    device: int,
    groups: list[StepGroup],
    kept: dict[int, Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Steps groups on a GPU, on torch's current stream there; returns before the GPU has done it.

    Step counts are on the CPU, so that the host computes a step's constants, until a step needs a number that only the
    GPU knows: then it counts by itself, there and from then on, and the host waits for nothing.

    Args:
        device: the GPU's number.
        groups: StepGroups of contiguous tensors there. Those with `max_grad_norm` are clipped.
        kept: the optimizer's memory on each GPU, which a step uses while it runs.
        grad_scale: by what a GradScaler has multiplied all gradients, one number; None for 1.
        found_inf: unless it is 0, one number, the step is not taken; None for 0.
    """
    kernels, stream = kernels_of(device), stream_of(device)
    on_host = grad_scale is None and found_inf is None and not any(map(_is_counted_there, groups))
    if on_host:
        kernels.step(groups, stream)
        return
    place = _place(device)
    for step in itertools.chain.from_iterable(group.steps for group in groups):
        if step.is_cpu:
            step.data = step.to(place, torch.float32)  # remains the tensor that is in the state
    scaler = (x if x is None else x.to(place, torch.float32) for x in (grad_scale, found_inf))
    kernels.counted_step(groups, stream, functools.partial(_memory_of, kept, device), *scaler)


def check_capture(groups: list[StepGroup]) -> None:
    """Raises RuntimeError if a CUDA graph is capturing a step that it could not replay.

    It would repeat this step's constants, if the host computes them; and it cannot capture that counts are moved.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return
    for group in groups:
        if not group.capturable or any(map(_is_on_cpu, group.steps)):
            raise RuntimeError(
                "ChildAdamW: a step that a CUDA graph captures needs capturable=True and one step taken before (got "
                f"capturable={group.capturable}); pass it to the constructor, and take a step outside the graph"
            )


_is_on_cpu = operator.attrgetter("is_cpu")


def _is_counted_there(group: StepGroup) -> bool:
    """Whether a group's step needs what only the GPU knows, or did so before."""
    reads = group.capturable or group.lr_on_device is not None or group.max_grad_norm is not None
    return reads or not all(map(_is_on_cpu, group.steps))


def _memory_of(kept: dict[int, Tensor], device: int, size: int) -> Tensor:
    """Memory of at least so many bytes: allocated at the first step, and when a later one needs more."""
    if device not in kept or kept[device].numel() < size:
        kept[device] = memory(device, size)
    return kept[device]


def memory(device: int, size: int) -> Tensor:
    """Returns so many bytes on a GPU, of any values."""
    return torch.empty(size, dtype=torch.uint8, device=_place(device))


def _place(device: int) -> torch.device:
    return torch.device("cuda", device)
