"""A step by the kernels of a GPU: who counts the steps, what memory it needs, and what a CUDA graph may capture."""

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from ..native import gpu
from .step_group import StepGroup

# An optimizer's memory on GPUs, which a step uses while it runs: {(number of a GPU, handle of a stream there): bytes}.
GpuMemory = dict[tuple[int, int], Tensor]


def step_on_gpu(
    device: int,
    groups: list[StepGroup],
    memory: GpuMemory,
    grad_scale: Tensor | float | None,
    found_inf: Tensor | float | None,
    checked: int = 0,
    undo: dict[Any, Any] | None = None,
) -> int:
    """Steps groups of contiguous tensors on a GPU, on torch's current stream; returns before the GPU has done it.

    The host counts the steps and computes their constants, until a step needs a number that only the GPU knows. From
    then on the GPU counts by itself, and the host waits for nothing. `checked`, `undo`, the result and the errors are
    those of the compiled module's `step`.
    """
    kernels, stream = gpu.load_kernels(device), gpu.stream_of(device)
    if grad_scale is None and found_inf is None and not any(map(_is_counted_on_gpu, groups)):
        return kernels.step(groups, stream, checked, undo)
    place = gpu.place(device)
    for count in itertools.chain.from_iterable(group.steps for group in groups):
        if count.is_cpu or count.dtype != torch.float64:  # a float32 would stop at 2**24, and no GPU can raise
            count.data = count.to(place, torch.float64)  # keeps the tensor object, which the state holds
    scaler = (
        x if x is None else torch.as_tensor(x, dtype=torch.float32, device=place) for x in (grad_scale, found_inf)
    )
    memory_of = functools.partial(_memory_of, memory, device, stream)
    return kernels.counted_step(groups, stream, memory_of, *scaler, checked, undo)


def check_capture(groups: list[StepGroup]) -> None:
    """Raises RuntimeError if a CUDA graph is capturing a step that it could not replay.

    A replay would repeat the constants of this step if the host had computed them, and a graph cannot capture that
    step counts move to the GPU.
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


def _is_counted_on_gpu(group: StepGroup) -> bool:
    """Returns whether a group's step, or an earlier one, needs a number that only the GPU knows."""
    reads = group.capturable or group.lr_on_device is not None or group.max_grad_norm is not None
    return reads or not all(map(_is_on_cpu, group.steps))


def _memory_of(memory: GpuMemory, device: int, stream: int, size: int) -> Tensor:
    """Returns at least `size` bytes for a step on a stream: new ones in a CUDA graph, else the last step's there.

    A graph keeps the address, so the memory must be the graph's own: torch's allocator takes it from the pool of the
    graph that is being captured. Steps on one stream run one after the other, so they share their memory; where it is
    too small, the allocator gives what is dropped here to later work of that stream alone.
    """
    if gpu.is_capturing(device):
        return gpu.memory(device, size)
    if (device, stream) not in memory or memory[device, stream].numel() < size:
        memory[device, stream] = gpu.memory(device, size)
    return memory[device, stream]
