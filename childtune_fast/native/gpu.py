"""The kernels of each GPU: device code made in one of three ways, loaded once and kept for the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import BackendError, load


class Gpu(NamedTuple):
    """The kernels of a GPU, or why there are none.

    Attributes:
        kernels: the compiled module's GpuKernels; None if there are none.
        origin: the way in which the kernels' device code was made; "" without kernels.
        notes: the failures of all other ways that were tried, one line each.
    """

    kernels: Any
    origin: str
    notes: list[str]


def stream_of(device: int) -> int:
    """Returns the handle of torch's current stream on a GPU, as the kernels take it."""
    return torch.cuda.current_stream(device).cuda_stream


def load_kernels(device: int) -> Any:
    """Returns the kernels of a GPU, the compiled module's GpuKernels.

    Raises:
        BackendError: there are none. The first failure is kept for the process and raised again.
    """
    gpu = find(device)
    if gpu.kernels is None:
        raise BackendError(
            f"childtune_fast has no kernels for GPU {device}: {'; '.join(gpu.notes)}; repair one of these ways, or "
            'choose backend="torch"'
        )
    return gpu.kernels


def find(device: int) -> Gpu:
    """Returns the kernels of a GPU, which the first call compiles and loads, or why there are none."""
    if device not in _found:
        with _lock:  # threads wait for the one that compiles
            if device not in _found:
                _found[device] = _look(device)
    return _found[device]


def images(properties: Any, notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the ways to make device code for a GPU and what each makes, the best one first; loads nothing.

    Args:
        properties: what `properties` returns for the GPU.
        notes: receives the failures of the ways that make none, one line each.
    """
    from .device_code import images

    for origin, make in images((properties.major, properties.minor)):
        image = None
        with _noting(origin, notes):
            image = make()
        if image is not None:
            yield origin, image


def use(device: int, origin: str, image: bytes) -> Any:
    """Loads a GPU's kernels from device code, for the whole process, and returns them.

    Args:
        device: number of the GPU.
        origin: the way in which the device code was made.
        image: the device code.

    Raises:
        BackendError: there is no native backend to launch them.
        RuntimeError: the driver does not load the code.
    """
    kernels = load.load_native().GpuKernels(device, image)
    _found[device] = Gpu(kernels, origin, [])
    return kernels


_found: dict[int, Gpu] = {}
_lock = threading.Lock()


def _look(device: int) -> Gpu:
    from .device_code import images

    if torch.version.cuda is None:
        return Gpu(None, "", ["this torch was built without CUDA"])
    native = load.find_native().module
    if native is None:
        return Gpu(None, "", ["there is no native backend to launch them"])
    notes: list[str] = []
    for origin, make in images(torch.cuda.get_device_capability(device)):
        with _noting(origin, notes):
            return Gpu(native.GpuKernels(device, make()), origin, notes)
    return Gpu(None, "", notes)


@contextlib.contextmanager
def _noting(origin: str, notes: list[str]) -> Iterator[None]:
    """Adds the error of one way to `notes` instead of raising it."""
    try:
        yield
    except (BackendError, RuntimeError) as error:
        notes.append(f"{origin}: {error}")


def properties(device: int) -> Any:
    """Returns what torch knows of a GPU: its name, compute capability (`major`, `minor`) and `uuid`."""
    return torch.cuda.get_device_properties(device)


def memory(device: int, size: int) -> Tensor:
    """Returns a uint8 tensor of `size` bytes on a GPU, uninitialised."""
    return torch.empty(size, dtype=torch.uint8, device=place(device))


def place(device: int) -> torch.device:
    """Returns the torch.device of a GPU."""
    return torch.device("cuda", device)


def synchronize(device: int) -> None:
    """Waits until a GPU has done all its work."""
    torch.cuda.synchronize(device)


@contextlib.contextmanager
def side_stream(device: int) -> Iterator[None]:
    """Makes a new stream of a GPU current, which begins after the work that the current one has."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def capture(device: int, work: Callable[[], None]) -> Callable[[], None]:
    """Has a CUDA graph capture work on a GPU without doing it; returns the function that does it, again and again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay
