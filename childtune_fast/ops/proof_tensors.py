"""Small tensors for the proof of a GPU's kernels, made on the CPU, and their comparison bit by bit."""

import copy
import math

import torch
from torch import Tensor

from .codes import NEAREST, block_count, block_numbers, encode_average, encode_square
from .packed_mask import PackedMask, unpack
from .step_group import State, compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 3, 127, 128, 129, 1023, 1025, 4097, 70_001)
TINY_SIZES = (1, 127, 129, 1025)
ODD_SIZES = (3, 129, 4097)  # again, at addresses at which no vector begins
MANY = 400  # tensors; more than a small table holds
# Of shards: (offset, run, stride) as in StepGroup.slices, and the number of runs. Offsets beyond 2**35 need the upper
# word of a Philox counter.
SLICES = (
    ((5, 1, 9), 7),
    ((64, 129, 200), 5),
    ((0, 128, 256), 9),
    ((1 << 33, 1025, 4096), 3),
    (((1 << 36) + 77, 4097, 0), 1),
)
# Of shards that are rounded stochastically: one run, which begins at a multiple of 128.
ROUNDED_SLICES = (
    ((128, 1025, 0), 1),
    (((1 << 39) - 256, 4097, 0), 1),
)


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def difference(found: Tensor, wanted: Tensor) -> str:
    """Returns how many bits of two tensors differ, and where first, or "" if none does.

    In 16 bits a NaN has one pattern (docs/numerics.md); in more, every NaN equals every NaN.
    """
    if found.element_size() == 2:
        same = found.view(torch.int16) == wanted.view(torch.int16)
    else:
        same = (found == wanted) & (found.signbit() == wanted.signbit()) | found.isnan() & wanted.isnan()
    if bool(same.all()):
        return ""
    where = int((~same).flatten().nonzero()[0])
    got, right = found.flatten()[where].item(), wanted.flatten()[where].item()
    return f"{int((~same).sum())} of {same.numel()} values differ, first at {where}: {got!r}, not {right!r}"


def shapes_of(tensors: str, rounded: bool) -> list[tuple[int, tuple[int, int, int] | None]]:
    """Returns for each parameter its size, and where it lies if it is a shard; `rounded`: stochastically."""
    if tensors == "many":
        return [((33, 0, 128, 257, 1, 1030)[i % 6], None) for i in range(MANY)]
    if tensors == "shards":
        return [(place[1] * runs, place) for place, runs in (ROUNDED_SLICES if rounded else SLICES) for _ in range(2)]
    sizes = TINY_SIZES if tensors == "tiny" else (*SIZES, *ODD_SIZES)
    return [(size, None) for size in sizes for _ in range(2)]


class Parameter:
    """One parameter of a case with its gradients, state and mask, all in one place.

    Attributes:
        param: values of shape [numel].
        grads: gradients of that shape, one for each step.
        state: the entries of its state, by torch.optim.AdamW's names; the step count begins on the CPU. In 8 bits the
            averages are codes, with scales by the names of StepGroup's fields.
        mask: mask of the child network, or None.
        slice: of a shard, as in StepGroup.slices; else None.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        number: int,
        numel: int,
        place: tuple[int, int, int] | None,
        *,
        masked: bool,
        amsgrad: bool,
        state: State,
        steps: int,
        special: bool,
    ) -> None:
        random = torch.Generator("cpu").manual_seed(number)

        def normal(size: int) -> Tensor:
            return torch.randn(size, generator=random, dtype=torch.float32, device="cpu")

        self.slice, self.mask, size = place, None, numel
        if masked:
            density = (0.3, 0.6, 0.3, 0.02, 1.0, 0.0)[number % 6]
            self.mask = PackedMask.pack(
                torch.rand(numel, generator=random, dtype=torch.float32, device="cpu") < density
            )
            size = self.mask.count
        self.param = normal(numel).to(dtype)
        self.grads = [normal(numel).to(dtype) for _ in range(steps)]
        for grad in self.grads[: numel // 128]:
            grad[:4] = torch.tensor([0.0, -0.0, 1e-40, 1e4], dtype=torch.float32, device="cpu")
            grad[16:48] = 0  # as of an embedding's row that no token had
            if special:  # which no norm survives
                grad[4:6] = torch.tensor([math.inf, math.nan], dtype=torch.float32, device="cpu")
        compute = compute_dtype(self.param)
        self.state = {
            "step": torch.tensor(7.0 * (number % 3 == 0), dtype=torch.float32, device="cpu"),
            "exp_avg": normal(size).to(compute) * (number % 4 < 2),  # zero, as before the first step, for some
            "exp_avg_sq": normal(size).to(compute).square() * (number % 2),
        }
        if amsgrad:
            self.state["max_exp_avg_sq"] = normal(size).to(compute).square()
        for key in list(self.state)[1:] if state != "float32" else ():
            self._store_in_fewer_bits(key, state)

    def _store_in_fewer_bits(self, key: str, state: State) -> None:
        """Replaces an average by what `state` stores of it."""
        values, numel = self.state[key], self.param.numel()
        if state == "bfloat16":
            self.state[key] = values.bfloat16()
            return
        inside = None if self.mask is None else unpack(self.mask.bits, self.param.shape)
        blocks = block_numbers(numel, inside, values.device)
        encode = encode_average if key == "exp_avg" else encode_square
        self.state[key], self.state[f"{key}_scales"] = encode(values, blocks, block_count(numel), NEAREST)

    def moved(self, device: torch.device, odd_grad: bool, odd: bool) -> "Parameter":
        """Returns a copy, all but the step count on a device, if odd at addresses that no vector begins at.

        Args:
            device: where the copy lies.
            odd_grad: whether the gradients are odd.
            odd: whether all else is.
        """

        def copied(tensor: Tensor, odd: bool) -> Tensor:
            memory = torch.empty(tensor.numel() + odd, dtype=tensor.dtype, device=device)
            return memory[int(odd) :].copy_(tensor)

        there = copy.copy(self)
        there.param, there.grads = copied(self.param, odd), [copied(grad, odd_grad) for grad in self.grads]
        there.state = {key: value.clone() if key == "step" else copied(value, odd) for key, value in self.state.items()}
        there.mask = None if self.mask is None else self.mask.to(device)
        return there

    def values(self) -> dict[str, Tensor]:
        """Returns what a step may change, on the CPU."""
        return {"parameter": self.param.cpu(), **{key: value.cpu() for key, value in self.state.items()}}
