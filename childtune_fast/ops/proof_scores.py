"""Cases of the proof that a GPU's kernels score and select right: squares and masks, beside the specification."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import gpu
from . import reference
from .proof_tensors import DTYPES, SIZES, difference, name_of
from .radix import OnGpu, select_in_parts


@dataclass(frozen=True)
class SquaresCase:
    """Squared gradients that are added to scores.

    Attributes:
        dtype: dtype of the gradients.
        clipped: whether each gradient is multiplied by a factor and clipped, or neither.
    """

    dtype: torch.dtype
    clipped: bool

    @property
    def name(self) -> str:
        """What the case is of, for a user."""
        return f"squares, {name_of(self.dtype)}: " + ("with a factor, clipped" if self.clipped else "without a factor")

    def check(self, device: int) -> str:
        """Runs the case on a GPU; returns what differed from the specification, or "" if nothing did."""
        kernels, place = gpu.load_kernels(device), gpu.place(device)
        factor, grad_clip = (0.37, 0.9) if self.clipped else (1.0, None)
        for number, (size, damage) in enumerate(itertools.product(SIZES, (0.0, float("inf"), float("nan")))):
            random = torch.Generator("cpu").manual_seed(number)
            grad = torch.randn(size + 1, generator=random, dtype=torch.float32, device="cpu").to(self.dtype)
            score = torch.randn(size + 1, generator=random, dtype=torch.float32, device="cpu").square()
            grad[size // 2] += damage
            start = number % 2  # every other case begins at an address at which no vector does
            there = score.to(place, copy=True)[start:], grad.to(place, copy=True)[start:]
            here = score[start:], grad[start:]
            finite = torch.ones((), dtype=torch.uint8, device=place)
            kernels.accumulate_squares(
                *there, 0.6, factor, grad_clip, finite, gpu.stream_of(device), functools.partial(gpu.memory, device)
            )
            right = factor
            if grad_clip is not None:
                right *= reference.clip_factor(grad_clip, reference.sum_of_squares([here[1]], [None]), factor)
            wanted = reference.accumulate_squares(*here, 0.6, right)
            if bool(finite.cpu()) != bool(wanted):
                return f"of {here[1].numel()} gradients, the flag of finite ones is not {bool(wanted)}"
            if differs := difference(there[0].cpu(), here[0]):
                return f"scores of {here[0].numel()} weights: {differs}"
        return ""


@dataclass(frozen=True)
class SelectionCase:
    """The highest or the lowest scores, with many ties.

    Attributes:
        largest: whether the highest are selected.
    """

    largest: bool

    @property
    def name(self) -> str:
        """What the case is of, for a user."""
        return "selection, float32: the " + ("highest" if self.largest else "lowest")

    def check(self, device: int) -> str:
        """Runs the case on a GPU; returns what differed from the specification, or "" if nothing did."""
        place = gpu.place(device)
        for kind, scores in _scores().items():
            names, total = [str(i) for i in range(len(scores))], sum(score.numel() for score in scores)
            for k in (0, 1, round(0.3 * total), total):
                wanted = reference.select(names, scores, k, self.largest)
                part = OnGpu(device, {i: score.to(place) for i, score in enumerate(scores)}, self.largest)
                found = select_in_parts([part], k)
                if found is None:
                    return f"{k} of {kind}: a score is said to be NaN, and none is"
                for i, mask in enumerate(wanted):
                    if differs := difference(found[i].cpu(), mask):
                        return f"{k} of {kind}, bytes of the mask of {scores[i].numel()} weights: {differs}"
        scores[-1][-1] = float("nan")
        part = OnGpu(device, {i: score.to(place) for i, score in enumerate(scores)}, self.largest)
        return "" if select_in_parts([part], 1) is None else "a score that is NaN is not seen"


def _scores() -> dict[str, list[Tensor]]:
    """Returns scores of every size, of several kinds."""
    random = torch.Generator("cpu").manual_seed(0)
    normal = [
        torch.randn(size, generator=random, dtype=torch.float32, device="cpu") for size in (*SIZES, *range(1, 60))
    ]
    return {
        "different scores": [score.square() for score in normal],
        "zeros of both signs": [score * 0.0 for score in normal],
        "scores with ties": [(score * 2).round() for score in normal],
        "infinite scores": [(score.sign() / (score.abs() < 1)).round() for score in normal],
    }


def score_cases() -> Iterator[SquaresCase | SelectionCase]:
    """Yields the cases: squares of every dtype, and both directions of selection."""
    yield from itertools.starmap(SquaresCase, itertools.product(DTYPES, (False, True)))
    yield from map(SelectionCase, (True, False))
