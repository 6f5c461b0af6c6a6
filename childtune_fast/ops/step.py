"""The step: kernels on the CPU, kernels on a GPU, or torch take it; before it, the host scales, skips and clips."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..native import gpu, load
from . import foreach, reference
from .squares import sum_of_squares
from .step_group import StepGroup, check_group

# Who steps a parameter: "cpu" stands for the compiled kernels on the CPU, a number for the kernels on that GPU, and
# None for torch.
Where = str | int | None


class StepKernels(NamedTuple):
    """The kernels that a step may use, found once for all of its parameters.

    Attributes:
        backend: the word that asked for them.
        native: the compiled module; None if torch steps everything.
        use_gpus: whether the kernels on GPUs step the parameters there; otherwise torch does.
    """

    backend: load.Backend
    native: ModuleType | None
    use_gpus: bool

    @classmethod
    def find(cls, backend: load.Backend) -> "StepKernels":
        """Returns the kernels that a backend asks for; raises as `load.resolve` does."""
        return cls(backend, load.resolve(backend), load.wants_gpu_kernels(backend))

    @property
    def on_cpu(self) -> Where:
        """Who steps a parameter on the CPU: "cpu" or, without the compiled module, None."""
        return None if self.native is None else "cpu"

    def elsewhere(self, tensors: Sequence[Tensor]) -> Where:
        """Returns who steps a parameter that is not on the CPU.

        Args:
            tensors: the parameter, its gradient and the averages in its state; for a sharded parameter, their local
                parts.

        Raises:
            BackendError: the kernels of its GPU are asked for and there are none.
        """
        param = tensors[0]
        if not (self.use_gpus and param.is_cuda):
            return None
        gpu.load_kernels(param.device.index)  # raises before anything is written
        return param.device.index if all(tensor.is_contiguous() for tensor in tensors) else None


def take_step(
    groups: Mapping[Where, list[StepGroup]],
    kernels: StepKernels,
    gpu_memory: dict[int, Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    """Takes one step; returns whether it was taken, as far as the host knows.

    Args:
        groups: the groups to step, by who steps them.
        kernels: the kernels with which `groups` were sorted.
        gpu_memory: {number of a GPU: the optimizer's memory on it}, which a step uses while it runs; this call may
            make it grow.
        grad_scale: tensor of one number, by which a GradScaler has multiplied all gradients; None for 1
            (default: None).
        found_inf: tensor of one number; unless it is 0, the step is not taken. None for 0 (default: None).

    Raises:
        RuntimeError, TypeError, ValueError: `check_group` refuses a group, `max_grad_norm` is given for sharded
            gradients, whose norm no rank knows, or a CUDA graph captures a step that it could not replay. Nothing has
            been written then.
    """
    on_cpu, on_torch = groups.get("cpu", []), groups.get(None, [])
    on_gpus = {where: on_gpu for where, on_gpu in groups.items() if isinstance(where, int)}
    of_gpus = list(itertools.chain.from_iterable(on_gpus.values()))
    everything = on_cpu + of_gpus + on_torch
    _check_norm(everything)
    if on_gpus or on_torch:
        _check_capture(everything)
    alone = bool(on_cpu) + len(on_gpus) + bool(on_torch) == 1
    by_host = not (on_gpus and alone)  # a GPU that steps everything scales, skips and clips without the host
    if by_host:
        if found_inf is not None and found_inf.item():
            return False
        _unscale(everything, grad_scale)
        grad_scale = found_inf = None
    for group in on_torch if alone else on_torch + of_gpus:  # kernels check only their own groups before they write
        check_group(group)
    with _explaining(on_cpu + of_gpus):
        if by_host:
            _clip(kernels.native, on_cpu, of_gpus + on_torch)
        if kernels.native is not None and on_cpu:
            kernels.native.step(on_cpu, torch.get_num_threads())
        for device, on_gpu in on_gpus.items():
            _step_on_gpu(device, on_gpu, gpu_memory, grad_scale, found_inf)
    if on_torch:
        foreach.step(on_torch)
    for group in on_cpu + of_gpus:
        increment_version([*group.params, *group.exp_avgs, *group.exp_avg_sqs, *group.max_exp_avg_sqs])
    return True


@contextlib.contextmanager
def _explaining(groups: list[StepGroup]) -> Iterator[None]:
    """Replaces the short errors of the kernels by the sentences of `check_group`."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, BufferError):
        for group in groups:
            check_group(group)
        raise


# ---- What the host does with the gradients' factor -----------------------------------------------------------------


def _check_norm(groups: list[StepGroup]) -> None:
    if any(group.slices is not None for group in groups) and any(group.max_grad_norm is not None for group in groups):
        raise ValueError(
            "ChildAdamW: max_grad_norm does not know the norm of gradients sharded over ranks; leave it None and "
            "call torch.nn.utils.clip_grad_norm_ before the step"
        )


def _unscale(groups: list[StepGroup], grad_scale: Tensor | float | None) -> None:
    if grad_scale is not None:
        scale = float(grad_scale)
        for group in groups:
            group.grad_factor /= scale


def _clip(native: ModuleType | None, on_cpu: list[StepGroup], elsewhere: list[StepGroup]) -> None:
    """Multiplies the groups' clip factors into their `grad_factor`; reads the gradients once, writes none."""
    groups = on_cpu + elsewhere
    if all(group.max_grad_norm is None for group in groups):
        return
    squares = sum_of_squares(native, *_normed(on_cpu)) if on_cpu else 0.0
    squares += sum_of_squares(None, *_normed(elsewhere))
    before = groups[0].grad_factor  # all groups have the same, except for the sign, which maximize changes
    for group in groups:
        if group.max_grad_norm is not None:
            group.grad_factor *= reference.clip_factor(group.max_grad_norm, squares, before)
            group.max_grad_norm = None  # so that no kernel clips again


def _normed(groups: list[StepGroup]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns the gradients that the norm is of, and for each the mask of the elements that count, or None."""
    rows: list[tuple[int, Tensor, Tensor | None]] = []
    for group in groups:
        bits = group.child_bits if group.child_norm and group.child_bits else [None] * len(group.grads)
        rows += zip(group.indices, group.grads, bits, strict=True)
    rows.sort(key=lambda row: row[0])  # the sum's order must not depend on how parameters were grouped
    return [row[1] for row in rows], [row[2] for row in rows]


# ---- GPUs ----------------------------------------------------------------------------------------------------------


def _step_on_gpu(
    device: int,
    groups: list[StepGroup],
    memory: dict[int, Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Steps groups of contiguous tensors on a GPU, on torch's current stream; returns before the GPU has done it.

    The host counts the steps and computes their constants, until a step needs a number that only the GPU knows. From
    then on the GPU counts by itself, and the host waits for nothing.
    """
    kernels, stream = gpu.load_kernels(device), gpu.stream_of(device)
    if grad_scale is None and found_inf is None and not any(map(_is_counted_on_gpu, groups)):
        kernels.step(groups, stream)
        return
    place = gpu.place(device)
    for count in itertools.chain.from_iterable(group.steps for group in groups):
        if count.is_cpu:
            count.data = count.to(place, torch.float32)  # keeps the tensor object, which the state holds
    scaler = (x if x is None else x.to(place, torch.float32) for x in (grad_scale, found_inf))
    kernels.counted_step(groups, stream, functools.partial(_memory_of, memory, device), *scaler)


def _check_capture(groups: list[StepGroup]) -> None:
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


def _memory_of(memory: dict[int, Tensor], device: int, size: int) -> Tensor:
    """Returns at least `size` bytes on a GPU, allocated at the first step and when a later one needs more."""
    if device not in memory or memory[device].numel() < size:
        memory[device] = gpu.memory(device, size)
    return memory[device]
