"""Cases of the proof that a GPU's kernels step right: AdamW, F and D on small tensors, beside the specification.

Each case makes parameters, gradients and state on the CPU, copies them to the GPU, takes the same steps in both places
and compares every bit.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..native import gpu
from . import reference
from .on_gpu import GpuMemory, step_on_gpu
from .proof_tensors import DTYPES, SIZES, Parameter, difference, name_of, shapes_of
from .random_mask import KEEP_ALL
from .step_group import SCALE_FIELDS, State, StepGroup

Trained = Literal["all weights", "a random mask", "a child network"]
TRAINED: tuple[Trained, ...] = ("all weights", "a random mask", "a child network")


@dataclass(frozen=True)
class StepCase:
    """What is stepped, and how. No GPU has run the kernels that round yet, but a CPU, in loops.

    Attributes:
        dtype: dtype of the parameters.
        trained: which weights a step trains.
        amsgrad: whether the running maximum is kept; without it, half of the parameters take variant="hf".
        state: how the averages are stored, however small a parameter is.
        stochastic: whether the parameters are rounded stochastically.
        tensors: "tiny" ones; a "few" of many sizes; "many" small ones, in one step; or "shards".
        counted: whether the GPU counts the steps, reads learning rates and a GradScaler's numbers there, and clips.
        way: "at once", "on a side stream", or "captured" by a CUDA graph, which then replays the step.
    """

    dtype: torch.dtype
    trained: Trained
    amsgrad: bool = False
    state: State = "float32"
    stochastic: bool = False
    tensors: Literal["tiny", "few", "many", "shards"] = "few"
    counted: bool = False
    way: Literal["at once", "on a side stream", "captured"] = "at once"

    @property
    def name(self) -> str:
        """What the case is of, for a user."""
        said = [self.tensors + ("" if self.tensors == "shards" else " tensors")]
        said += ["amsgrad"] * self.amsgrad
        said += [f"state in {self.state}"] * (self.state != "float32")
        said += ["rounded stochastically"] * self.stochastic
        said += ["steps counted, scaled, skipped and clipped on the GPU"] * self.counted
        said += [self.way] * (self.way != "at once")
        return f"step of {self.trained}, {name_of(self.dtype)}: " + ", ".join(said)

    @property
    def rounded(self) -> bool:
        """Whether the step draws random bits to round."""
        return self.stochastic or self.state != "float32"

    @property
    def steps(self) -> int:
        """How many steps are taken: those that the GPU counts need a first one, one that is skipped, and one more."""
        return 3 if self.counted else 1 if self.tensors == "many" else 2

    def check(self, device: int) -> str:
        """Runs the case on a GPU; returns what differed from the specification, or "" if nothing did."""
        options: dict[str, Any] = {
            "masked": self.trained == "a child network",
            "amsgrad": self.amsgrad,
            "state": self.state,
            "steps": self.steps,
            "special": not self.counted,
        }
        shapes = shapes_of(self.tensors, self.rounded)
        params = [Parameter(self.dtype, i, *shape, **options) for i, shape in enumerate(shapes)]
        on_gpu, on_cpu = _Run(self, params, device), _Run(self, params, None)
        with gpu.side_stream(device) if self.way == "on a side stream" else contextlib.nullcontext():
            for number in range(self.steps):
                on_gpu.take(device, number)
        gpu.synchronize(device)
        for number in range(self.steps):
            on_cpu.take_as_specified(number)
        return on_gpu.difference_from(on_cpu)


def trial_cases() -> Iterator[StepCase]:
    """Yields the smallest cases, which take milliseconds."""
    for trained in TRAINED:
        yield StepCase(torch.float32, trained, tensors="tiny")


def step_cases() -> Iterator[StepCase]:
    """Yields the cases, the smaller ones first: every kind of kernel, and every way in which a step is launched."""
    everything = itertools.product(DTYPES, TRAINED)
    for dtype, trained in everything:
        plain = StepCase(dtype, trained)
        yield from (plain, replace(plain, amsgrad=True), replace(plain, counted=True))
        if trained != "a child network":
            yield replace(plain, tensors="shards")
    for trained in TRAINED:
        yield StepCase(torch.float32, trained, way="on a side stream")
        yield StepCase(torch.float32, trained, counted=True, way="captured")
        yield StepCase(torch.float32, trained, amsgrad=True, counted=True, tensors="many")
        if trained != "a child network":
            yield StepCase(torch.float32, trained, amsgrad=True, counted=True, tensors="shards")
    for dtype, trained, amsgrad in itertools.product(DTYPES, TRAINED, (False, True)):
        yield StepCase(dtype, trained, amsgrad=amsgrad, tensors="many")
    yield from _rounded_cases()


def _rounded_cases() -> Iterator[StepCase]:
    """Yields the cases of the kernels that round."""
    for dtype, trained in itertools.product(DTYPES, TRAINED):
        if dtype == torch.float64:
            continue
        codes = StepCase(dtype, trained, state="8bit")
        yield from (codes, replace(codes, counted=True), replace(codes, amsgrad=True, tensors="many"))
        yield StepCase(dtype, trained, amsgrad=True, state="bfloat16")
        if trained != "a child network":
            yield replace(codes, tensors="shards")
        if dtype != torch.float32:
            yield from (replace(codes, amsgrad=True, stochastic=True), StepCase(dtype, trained, stochastic=True))


class _Run:
    """The parameters of a case in one place, and the steps that they take.

    Attributes:
        scale, found_inf, lrs: the numbers that the GPU reads where it counts the steps.
        grads: the gradients of the next step; a CUDA graph needs them in one place.
    """

    def __init__(self, case: StepCase, params: list[Parameter], device: int | None) -> None:
        self.case = case
        self.memory: GpuMemory = {}
        place = torch.device("cpu") if device is None else gpu.place(device)
        odd = [case.tensors == "few" and i >= 2 * len(SIZES) for i in range(len(params))]
        if device is not None:
            params = [p.moved(place, o, o and i % 2 == 0) for i, (p, o) in enumerate(zip(params, odd, strict=True))]
        self.params = params
        self.scale, self.found_inf, *self.lrs = (
            torch.zeros((), dtype=dtype, device=place) for dtype in (*[torch.float32] * 3, torch.float64)
        )
        self.grads = [param.grads[0] for param in self.params]
        self.replay: Callable[[], None] | None = None

    def _set(self, number: int) -> None:
        """Sets gradients and numbers to those of a step; the second of the steps that are counted is skipped."""
        self.scale.fill_(3.0 + number)
        self.found_inf.fill_(float(number == 1))
        for i, lr in enumerate(self.lrs):
            lr.fill_(0.01 / (1 + i + number))
        for param, grad in zip(self.params, self.grads, strict=True):
            grad.copy_(param.grads[number])

    def _groups(self) -> list[StepGroup]:
        """Returns two groups that share nothing but the seed; parameters alternate between them."""
        case = self.case
        draws = case.trained == "a random mask"
        numbers: dict[str, Any] = {
            "eps": 1e-8,
            "amsgrad": case.amsgrad,
            "state": case.state,
            "stochastic": case.stochastic,
            "seed": 0xFEED_0123_4567_89AB,
            "capturable": case.counted,
        }
        first = StepGroup(
            lr=1e-2,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.1,
            grad_factor=1.0,
            published_code=False,
            keep_threshold=19661 if draws else KEEP_ALL,
            max_grad_norm=0.5 if case.counted else None,
            child_norm=True,
            **numbers,
        )
        second = StepGroup(
            lr=2e-3,
            beta1=0.8,
            beta2=0.95,
            weight_decay=0.5,
            grad_factor=-1.0,
            published_code=not case.amsgrad,
            keep_threshold=45000 if draws else KEEP_ALL,
            max_grad_norm=None,
            decay_outside=True,
            **numbers,
        )
        for i, param in enumerate(self.params):
            _add(second if i % 2 else first, i + 3, param, self.grads[i])
        return [group for group in (first, second) if group.params]

    def take(self, device: int, number: int) -> None:
        """Takes a step on the GPU, as an optimizer does."""
        self._set(number)
        if self.case.way != "captured" or number == 0:  # the first step moves the counts, which no graph can
            self._step(device)
            return
        if self.replay is None:
            self.replay = gpu.capture(device, functools.partial(self._step, device))
        self.replay()

    def _step(self, device: int) -> None:
        groups = self._groups()
        for group, lr in zip(groups, self.lrs, strict=True) if self.case.counted else ():
            group.lr, group.lr_on_device = math.nan, lr
        scaler = (self.scale, self.found_inf) if self.case.counted else (None, None)
        step_on_gpu(device, groups, self.memory, *scaler)

    def take_as_specified(self, number: int) -> None:
        """Takes the same step on the CPU, by the specification."""
        self._set(number)
        groups = self._groups()
        if self.case.counted:
            if self.found_inf:
                return
            for group, lr in zip(groups, self.lrs, strict=True):
                group.lr = lr.item()
                group.grad_factor /= self.scale.item()
            bits = [None if i % 2 or p.mask is None else p.mask.bits for i, p in enumerate(self.params)]
            squares = reference.sum_of_squares(self.grads, bits)
            groups[0].grad_factor *= reference.clip_factor(0.5, squares, groups[0].grad_factor)
        reference.step(groups)

    def difference_from(self, expected: "_Run") -> str:
        """Returns the first difference between what two runs have come to, or ""."""
        for mine, other in zip(self.params, expected.params, strict=True):
            found, wanted = mine.values(), other.values()
            for key in found:
                if differs := difference(found[key], wanted[key]):
                    return f"{key} of {mine.param.numel()} weights: {differs}"
        return ""


def _add(group: StepGroup, index: int, param: Parameter, grad: Tensor) -> None:
    """Adds a parameter to a group."""
    group.params.append(param.param)
    group.grads.append(grad)
    group.exp_avgs.append(param.state["exp_avg"])
    group.exp_avg_sqs.append(param.state["exp_avg_sq"])
    group.steps.append(param.state["step"])
    group.indices.append(index)
    if group.amsgrad:
        group.max_exp_avg_sqs.append(param.state["max_exp_avg_sq"])
    for scales in SCALE_FIELDS:
        if scales in param.state:
            getattr(group, scales).append(param.state[scales])
    if param.mask is not None:
        group.child_bits.append(param.mask.bits)
        group.child_offsets.append(param.mask.offsets)
        group.child_counts.append(param.mask.count)
    if param.slice is not None:
        group.slices = [*(group.slices or []), param.slice]
