"""The step: kernels on the CPU, kernels on a GPU, or torch take it; before it, the host scales, skips and clips."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..arguments import as_float
from ..native import CudaError, UnverifiedMemory, load
from . import foreach, trust
from .clip import clip, unscale
from .memory import check_apart, places
from .on_gpu import GpuMemory, check_capture, step_on_gpu
from .packed_mask import Masks
from .step_group import StepGroup, check_group, written
from .undisturbed import undisturbed

if TYPE_CHECKING:
    from .ranks import NormOverRanks

# Who steps a parameter: "cpu" stands for the compiled kernels on the CPU, a number for the kernels on that GPU, and
# None for torch.
Where = str | int | None


class StepInterrupted(RuntimeError):
    """A step was taken in part: some parameters and states are those of after it, others those of before it."""


@dataclass
class StepMemory:
    """What an optimizer's steps leave for the next one.

    Attributes:
        on_gpus: the memory on GPUs that steps use while they run.
        written: {who steps: which memory that step wrote}, whose tensors are known to lie apart.
        interrupted: whether a step has been taken in part, and no checkpoint has been loaded since.
    """

    on_gpus: GpuMemory = field(default_factory=dict)
    written: dict[Where, Any] = field(default_factory=dict)
    interrupted: bool = False


class StepKernels(NamedTuple):
    """The kernels that a step may use, found once for all of its parameters.

    Attributes:
        backend: the word that asked for them.
        choice: the word that it stands for, CHILDTUNE_BACKEND considered.
        native: the compiled module; None if torch steps everything.
        wait: whether a step waits until it is known if the kernels on GPUs are right.
        on_gpus: {number of a GPU: its kernels, or None}, asked once in a step, so that all of it is taken alike.
    """

    backend: load.Backend
    choice: load.Backend
    native: ModuleType | None
    wait: bool
    on_gpus: dict[int, Any]

    @classmethod
    def find(cls, backend: load.Backend, wait: bool = False) -> "StepKernels":
        """Returns the kernels that a backend asks for; raises as `load.resolve` does."""
        return cls(backend, load.chosen(backend), load.resolve(backend), wait, {})

    @property
    def on_cpu(self) -> Where:
        """Who steps a parameter on the CPU: "cpu" or, without the compiled module, None."""
        return None if self.native is None else "cpu"

    def state_reader(self, states: Mapping[Tensor, Any], masks: Masks | None) -> Any:
        """Returns what reads usual parameters on the CPU, as csrc/python/state_reader.h says; None if nothing does."""
        return None if self.native is None else self.native.StateReader(states, masks)

    def elsewhere(self, tensors: Sequence[Tensor]) -> Where:
        """Returns who steps a parameter that is not on the CPU.

        Args:
            tensors: the parameter, its gradient and the averages in its state, with the scales of 8-bit ones; for a
                sharded parameter, their local parts.

        Raises:
            BackendError: the kernels of its GPU are asked for and there are none. Nothing has been written then.
        """
        param = tensors[0]
        if self.native is None or not param.is_cuda:
            return None
        device = param.device.index
        if device not in self.on_gpus:
            self.on_gpus[device] = trust.kernels_of(device, self.choice, self.wait)
        if self.on_gpus[device] is None:
            return None
        return device if all(tensor.is_contiguous() for tensor in tensors) else None


def prepare(backend: load.Backend, param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Loads what steps of these groups need, as early as can be: a GPU's memory may be full at the first step.

    Args:
        backend: the word that asks for kernels; for "auto", the CPU's are left for the first step.
        param_groups: the optimizer's groups, with their parameters where they are now.

    Raises:
        BackendError: kernels are asked for, and there are none.
    """
    if backend == "native":
        load.resolve(backend)
    params = itertools.chain.from_iterable(group["params"] for group in param_groups)
    devices = sorted({param.device.index for param in params if param.is_cuda})
    trust.prepare(devices, load.chosen(backend))


def take_step(
    groups: Mapping[Where, list[StepGroup]],
    kernels: StepKernels,
    memory: StepMemory,
    undo: dict[Any, Any],
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
    over_ranks: "NormOverRanks | None" = None,
) -> None:
    """Takes one step, or none of it.

    Args:
        groups: the groups to step, by who steps them.
        kernels: the kernels with which `groups` were sorted.
        memory: what the optimizer's earlier steps left.
        undo: what to undo if no step is taken. It is cleared together with the last write of the step, so that whatever
            exception a signal's handler raises, and when, the dict says whether the step has been taken.
        grad_scale: number, or tensor of one, by which a GradScaler has multiplied all gradients; None for 1
            (default: None).
        found_inf: number, or tensor of one; unless it is 0, the step is not taken. A GradScaler that has seen no
            gradient gives a number. None for 0 (default: None).
        over_ranks: adds up the squares for `max_grad_norm` where parameters are cut over ranks; None if none is, or
            there is no limit (default: None).

    Raises:
        StepInterrupted: a GPU's driver has refused to go on after a part of the step.
        RuntimeError, TypeError, ValueError: `check_group` refuses a group, parameters and state overlap in memory, a
            CUDA graph captures a step that it could not replay, or `over_ranks` says that another rank has raised.
            Nothing has been written then.
        CudaError: a GPU's driver has refused the step. Nothing has been written then.
    """
    on_cpu, on_torch = groups.get("cpu", []), groups.get(None, [])
    on_gpus = {where: on_gpu for where, on_gpu in groups.items() if isinstance(where, int)}
    of_gpus = list(itertools.chain.from_iterable(on_gpus.values()))
    everything = on_cpu + of_gpus + on_torch
    if on_gpus or on_torch:
        check_capture(everything)
    alone = bool(on_cpu) + len(on_gpus) + bool(on_torch) == 1
    # A GPU that steps everything scales, skips and clips without the host, unless other ranks have parts of the norm.
    by_host = over_ranks is not None or not (on_gpus and alone)
    skip = by_host and _scale_on_host(everything, grad_scale, found_inf)
    if skip and over_ranks is None:
        return
    if by_host:
        grad_scale = found_inf = None
    for group in on_torch if alone else on_torch + of_gpus:  # kernels check only their own groups before they write
        check_group(group)
    try:
        clips = over_ranks is not None or any(group.max_grad_norm is not None for group in everything)
        if by_host and clips and clip(kernels.native, on_cpu, of_gpus + on_torch, over_ranks, skip):
            return
        calls: dict[Where, Callable[..., int]] = {
            device: functools.partial(step_on_gpu, device, on_gpu, memory.on_gpus, grad_scale, found_inf)
            for device, on_gpu in on_gpus.items()
        }
        if kernels.native is not None and on_cpu:
            calls = {"cpu": functools.partial(kernels.native.step, on_cpu, torch.get_num_threads()), **calls}
        _write(calls, on_torch, everything, memory, undo)
    except (CudaError, StepInterrupted):
        raise
    except (TypeError, ValueError, RuntimeError, BufferError, MemoryError):  # the last by a gradient expanded too far
        for group in on_cpu + of_gpus:
            check_group(group)  # whose sentence says more than the kernels' short errors
        raise
    _tell_autograd(everything)


def _scale_on_host(
    groups: list[StepGroup], grad_scale: Tensor | float | None, found_inf: Tensor | float | None
) -> bool:
    """Divides the groups' `grad_factor` by a GradScaler's scale; returns whether the step is to be skipped instead."""
    skip = found_inf is not None and as_float("found_inf", found_inf) != 0
    if grad_scale is not None and not skip:
        unscale(groups, grad_scale)
    return skip


def _write(
    calls: Mapping[Where, Callable[..., int]],
    on_torch: list[StepGroup],
    everything: list[StepGroup],
    memory: StepMemory,
    undo: dict[Any, Any],
) -> None:
    """Writes a step, and clears `undo` with its last write: one call of kernels, or several parts, undisturbed."""
    if len(calls) == 1 and not on_torch:
        _call_kernels(calls, everything, memory, undo, True)
        return
    if not everything:
        return
    _check_apart(everything, memory)
    _check_writable(on_torch)
    with undisturbed():
        _call_kernels(calls, everything, memory, undo, False)
        if on_torch:
            _step_in_torch(on_torch, bool(calls), memory, undo)
        undo.clear()


def _call_kernels(
    calls: Mapping[Where, Callable[..., int]],
    everything: list[StepGroup],
    memory: StepMemory,
    undo: dict[Any, Any],
    alone: bool,
) -> None:
    """Calls the kernels' steps, each of which writes all or nothing; one that is `alone` clears `undo` as it writes.

    A step that writes to other memory than the last one, and cannot tell by its addresses alone that nothing overlaps,
    asks for a closer look.
    """
    begun, to_clear = False, undo if alone else None
    for where, call in calls.items():
        try:
            try:
                memory.written[where] = call(memory.written.get(where, 0), to_clear)
            except UnverifiedMemory as doubt:
                _check_apart(everything, memory)
                memory.written[where] = call(doubt.digest, to_clear)
        except CudaError as error:
            if begun or error.begun:
                raise _interrupted(error, memory, undo) from error
            raise
        begun = True


def _step_in_torch(groups: list[StepGroup], begun: bool, memory: StepMemory, undo: dict[Any, Any]) -> None:
    """Takes torch's part of a step; raises StepInterrupted where an error, such as of memory, comes after a write."""
    tensors = [tensor for tensor in written(groups) if not tensor.is_inference()]  # which count no versions
    versions = [tensor._version for tensor in tensors]
    try:
        foreach.step(groups)
    except (RuntimeError, MemoryError) as error:
        if begun or versions != [tensor._version for tensor in tensors]:
            raise _interrupted(error, memory, undo) from error
        raise


def _check_apart(groups: list[StepGroup], memory: StepMemory) -> None:
    """Raises ValueError if what a step writes overlaps; looks only if it is other memory than the last time."""
    found = places(written(groups))
    if memory.written.get(None) != found:
        check_apart(written(groups), "the parameters and the state that a step writes")
        memory.written[None] = found


def _check_writable(groups: list[StepGroup]) -> None:
    """Raises RuntimeError if torch would refuse to write one of many tensors; kernels do not ask it."""
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in written(groups)):
        raise RuntimeError(
            "ChildAdamW: a parameter or its state was made in torch.inference_mode(), and torch does not change such "
            "tensors outside of it; take no step in it, and make the optimizer anew"
        )


def _tell_autograd(groups: list[StepGroup]) -> None:
    """Counts a write to the DTensors of which a step writes only the local part; kernels count theirs themselves."""
    for group in groups:
        if group.sharded:
            increment_version(group.sharded)


def _interrupted(error: Exception, memory: StepMemory, undo: dict[Any, Any]) -> StepInterrupted:
    """Notes that the states are neither those of before nor those of after the step, and returns what to raise."""
    memory.interrupted = True
    undo.clear()
    return StepInterrupted(
        f"ChildAdamW: a step was taken in part ({error}), so that parameters and state do not belong together any "
        "more; load the model's and the optimizer's checkpoint before the next step"
    )
