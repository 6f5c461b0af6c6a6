"""The kernels of each GPU: device code made in one of three ways, loaded once and kept for the process.

So is a failure, if it would be the same at the next attempt. One that may pass, such as a GPU without free memory, and
one after which the GPU cannot be used, are raised and not kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import BackendError, CudaError, load

OUT_OF_MEMORY = 2
# The driver's codes that say that it cannot take an image: invalid, none for this GPU, PTX that is invalid, is too new
# for it, or is not compiled here. 0 stands for a failure that is not the driver's.
LASTING = {0, 200, 209, 218, 221, 222, 223}


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
        BackendError: there are none, or `find` raises.
    """
    gpu = find(device)
    if gpu.kernels is None:
        raise BackendError(
            f"childtune_fast has no kernels for GPU {device}: {'; '.join(gpu.notes)}; repair one of these ways, or "
            'choose backend="torch"'
        )
    return gpu.kernels


def find(device: int) -> Gpu:
    """Returns the kernels of a GPU, which the first call compiles and loads, or why there are none.

    Raises:
        CudaError: the driver cannot load them now. Nothing of this is kept, so that the next call tries again.
        BackendError: a CUDA graph is being captured, and they are not loaded yet.
    """
    if device not in _found:
        with _lock:  # threads wait for the one that compiles
            if device not in _found:
                _found[device] = _look(device)
    return _found[device]


def images(device: int, known: Any, notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the ways to make device code for a GPU and what each makes, the best one first; loads nothing.

    Args:
        device: number of the GPU.
        known: what `properties` returns for it.
        notes: receives the failures of the ways that make none, one line each.
    """
    from .device_code import images

    for origin, make in images((known.major, known.minor)):
        image = None
        with _noting(device, origin, notes):
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
        CudaError: the driver does not load the code.
    """
    kernels = _loaded(load.load_native(), device, image)
    _found[device] = Gpu(kernels, origin, [])
    return kernels


_found: dict[int, Gpu] = {}
_lock = threading.Lock()


def _look(device: int) -> Gpu:
    if torch.version.cuda is None:
        return Gpu(None, "", ["this torch was built without CUDA"])
    native = load.find_native().module
    if native is None:
        return Gpu(None, "", ["there is no native backend to launch them"])
    if is_capturing(device):  # which loading would spoil
        raise BackendError(
            f"childtune_fast cannot load its kernels onto GPU {device} while a CUDA graph is captured; take one step "
            "outside of the graph before, and pass capturable=True to the constructor"
        )
    notes: list[str] = []
    for origin, image in images(device, properties(device), notes):
        with _noting(device, origin, notes):
            return Gpu(_loaded(native, device, image), origin, notes)
    return Gpu(None, "", notes)


@contextlib.contextmanager
def _noting(device: int, origin: str, notes: list[str]) -> Iterator[None]:
    """Adds the error of one way to `notes` instead of raising it, unless it is one that may pass."""
    try:
        yield
    except BackendError as error:
        code = error.code if isinstance(error, CudaError) else 0
        if code not in LASTING:
            raise CudaError(
                f"childtune_fast cannot load its kernels onto GPU {device} now: {error}; repair the cause and try "
                'again, or choose backend="torch"',
                code,
            ) from error
        notes.append(f"{origin}: {error}")


def properties(device: int) -> Any:
    """Returns what torch knows of a GPU: its name, compute capability (`major`, `minor`) and `uuid`."""
    return torch.cuda.get_device_properties(device)


def _loaded(native: ModuleType, device: int, image: bytes) -> Any:
    """Returns the kernels that an image has for a GPU; torch gives back memory that it holds free, if they need it."""
    try:
        return native.GpuKernels(device, image)
    except CudaError as error:
        if error.code != OUT_OF_MEMORY:
            raise
    torch.cuda.empty_cache()
    return native.GpuKernels(device, image)


def is_capturing(device: int) -> bool:
    """Returns whether a CUDA graph is capturing torch's current stream on a GPU."""
    if not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


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
