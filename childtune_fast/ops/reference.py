"""The four operations in pure torch, on any device: the readable specification of the compiled kernels.

The results have the same bits as the kernels'. Each line rounds as csrc/core does: no fused multiply-add, no
reciprocal, constants computed in double and rounded once.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .packed_mask import pack, unpack
from .random_mask import KEEP_ALL, bernoulli_mask
from .rounding import stored_randomly
from .state_values import StateValues
from .step_group import StepGroup, compute_dtype

NORM_CHUNK = 1024
_NAN_BITS = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}


class AdamWConstants(NamedTuple):
    """The numbers of a step that do not depend on the element; csrc/core/constants.h has the same."""

    grad_factor: float
    decay_before: float
    step_size: float
    bias_correction2_sqrt: float
    decay_after: float


def integer_power(base: float, exponent: int) -> float:
    """Returns `base**exponent` by repeated squaring, whose bits, unlike those of libm's `pow`, never vary."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def step_constants(group: StepGroup, step: int) -> AdamWConstants:
    """Returns the constants, computed in double, of step number `step`; the first step is 1."""
    bias_correction1 = 1 - integer_power(group.beta1, step)
    bias_correction2_sqrt = math.sqrt(1 - integer_power(group.beta2, step))
    step_size = group.lr / bias_correction1
    decay = 1 - group.lr * group.weight_decay
    grad_factor = group.grad_factor / (group.keep_threshold / KEEP_ALL)
    if group.published_code:
        return AdamWConstants(grad_factor, 1.0, step_size * bias_correction2_sqrt, 1.0, decay)
    return AdamWConstants(grad_factor, decay, step_size, bias_correction2_sqrt, 1.0)


def step(groups: list[StepGroup]) -> None:
    """Takes one step for every parameter of every group, in place."""
    for group in groups:
        for i in range(len(group.params)):
            _step_param(group, i)


def _step_param(group: StepGroup, i: int) -> None:
    param, grad = group.params[i], group.grads[i]
    step = int(group.steps[i].item()) + 1
    c = step_constants(group, step)

    child = unpack(group.child_bits[i], param.shape) if group.child_bits else None
    state = StateValues(group, i, step, child)
    exp_avg, exp_avg_sq, second_moment = state.exp_avg, state.exp_avg_sq, state.second_moment
    weights = param
    if child is not None:  # the state has only the child network's values, so `weights` and `grad` get the same
        weights, grad = param[child], grad[child]
        if group.decay_outside:
            param.copy_(stored(param.to(exp_avg.dtype) * c.decay_before * c.decay_after, param.dtype))

    grad = grad.to(exp_avg.dtype) * c.grad_factor
    if group.keep_threshold < KEEP_ALL:
        grad = torch.where(_mask(group, i, step), grad, 0.0)
    exp_avg.copy_(exp_avg * group.beta1 + grad * (1 - group.beta1))
    exp_avg_sq.copy_(exp_avg_sq * group.beta2 + grad * (1 - group.beta2) * grad)
    if group.amsgrad:
        second_moment.copy_(torch.where(exp_avg_sq <= second_moment, second_moment, exp_avg_sq))
    # The divisor is a tensor, because on CUDA torch divides by a Python number as a multiplication with the reciprocal.
    bias_correction2_sqrt = torch.full((), c.bias_correction2_sqrt, dtype=exp_avg.dtype, device=exp_avg.device)
    denom = _sqrt(second_moment) / bias_correction2_sqrt + group.eps
    decayed = weights.to(exp_avg.dtype) * c.decay_before
    updated = (decayed - exp_avg * c.step_size / denom) * c.decay_after
    if group.stochastic:
        rounded = stored_randomly(updated, param.dtype, state.random.param.view(updated.shape))
    else:
        rounded = stored(updated, param.dtype)
    if child is None:
        param.copy_(rounded)
    else:
        param[child] = rounded
    state.store()
    group.steps[i].fill_(step)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns values as parameters of a dtype hold them, rounded to nearest; in 16 bits, every NaN has the same bits.

    They are those of csrc/core/dtypes.h. torch's conversions give others on a GPU, and on the CPU in vectors.
    """
    rounded = values.to(dtype)
    if dtype in _NAN_BITS:
        rounded.view(torch.int16).masked_fill_(rounded.isnan(), _NAN_BITS[dtype])
    return rounded


def _mask(group: StepGroup, i: int, step: int) -> Tensor:
    """Returns the mask of a parameter, or of the part of a sharded parameter that this rank holds."""
    grad = group.grads[i]
    offset, run, stride = (0, grad.numel(), 0) if group.slices is None else group.slices[i]
    runs = [
        bernoulli_mask(
            (run,),
            group.keep_threshold / KEEP_ALL,
            seed=group.seed,
            step=step,
            param_index=group.indices[i],
            offset=offset + k * stride,
            device=grad.device,
        )
        for k in range(grad.numel() // max(run, 1))
    ]
    return torch.cat(runs).view(grad.shape) if runs else torch.empty(grad.shape, dtype=torch.bool, device=grad.device)


def _sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root.

    On the CPU it is numpy's, because torch's (MKL's) is off by an ulp for a tenth of all floats.
    """
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.is_cpu else torch.sqrt(x)


def clip_factor(max_norm: float, squares: float, grad_factor: float) -> float:
    """Returns the factor that limits the 2-norm of gradients to `max_norm`, as torch's clip_grad_norm_ computes it.

    Args:
        max_norm: limit of the 2-norm.
        squares: sum of the squares of the gradients, before they are multiplied by `grad_factor`.
        grad_factor: number that the gradients are multiplied by before they are clipped.
    """
    factor = max_norm / (math.sqrt(squares) * abs(grad_factor) + 1e-6)
    return 1.0 if factor >= 1.0 else factor  # NaN stays NaN, as in clip_grad_norm_


def sum_of_squares(tensors: Sequence[Tensor], child_bits: Sequence[Tensor | None]) -> float:
    """Returns the sum of the squares of all elements, in double and in a fixed order.

    In each tensor, chunks of 1024 elements in logical order are summed by halving; then the chunks' sums are summed by
    halving, as if padded with zeros to a power of two. The tensors' sums are added one after the other.

    Args:
        tensors: gradients of any dtype and shape.
        child_bits: one entry for each tensor: the packed mask of its elements that count, uint8, or None if all count.
    """
    totals: list[Tensor] = []
    for tensor, bits in zip(tensors, child_bits, strict=True):
        if tensor.numel() == 0:
            continue
        squares = tensor.double().square()
        if bits is not None:
            squares = torch.where(unpack(bits, tensor.shape), squares, 0.0)
        squares = squares.flatten()
        chunks = -(-squares.numel() // NORM_CHUNK)
        padded = torch.nn.functional.pad(squares, (0, chunks * NORM_CHUNK - squares.numel()))
        sums = sum_by_halving(padded.view(chunks, NORM_CHUNK))
        sums = torch.nn.functional.pad(sums, (0, (1 << (chunks - 1).bit_length()) - chunks))
        totals.append(sum_by_halving(sums))
    return in_turn(numbers(totals))


def in_turn(numbers: Iterable[float]) -> float:
    """Returns the sum of numbers, added one after the other; from Python 3.12 on, `sum` rounds otherwise."""
    return functools.reduce(operator.add, numbers, 0.0)


def numbers(scalars: list[Tensor]) -> list[float]:
    """Returns the values of 0-dim tensors; waits for each device once, and not once for each tensor."""
    values: dict[int, float] = {}
    for device in {scalar.device for scalar in scalars}:
        of_device = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        values.update(zip(of_device, torch.stack([scalars[i] for i in of_device]).tolist(), strict=True))
    return [values[i] for i in range(len(scalars))]


def sum_by_halving(x: Tensor) -> Tensor:
    """Returns the sums over the last dimension, whose length is a power of two: its halves are added, and so on."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x.squeeze(-1)


def accumulate_squares(score: Tensor, grad: Tensor, weight: float, grad_factor: float) -> Tensor:
    """Adds `weight * (grad * grad_factor)**2` to the float32 tensor `score`, in place, as csrc/core/fisher.h does.

    Returns:
        bool tensor of shape [], on the gradient's device: whether every element of the gradient was finite.
    """
    dtype = compute_dtype(grad)
    scaled = grad.to(dtype) * grad_factor
    score.copy_(score.to(dtype) + scaled * weight * scaled)
    return torch.isfinite(grad).all()


def select(names: list[str], scores: list[Tensor], k: int, largest: bool) -> list[Tensor]:
    """Returns the packed masks of the `k` highest or lowest of all scores; of equal scores, the earlier is selected.

    Args:
        names: names of the tensors, for the error.
        scores: float32 tensors, contiguous.
        k: number of scores to select.
        largest: whether the highest scores are selected, or else the lowest.

    Raises:
        ValueError: a score is NaN.
    """
    keys = []  # integers of the same order as the scores
    for name, tensor in zip(names, scores, strict=True):
        if tensor.isnan().any():
            refuse_nan(name)
        float_bits = tensor.reshape(-1).view(torch.int32)
        magnitude = float_bits & 0x7FFFFFFF
        keys.append(torch.where(float_bits < 0, -magnitude, magnitude).to(scores[0].device))
    if not keys:
        return []
    order = torch.cat(keys).argsort(descending=largest, stable=True)
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    chosen[order[:k]] = True
    ends = itertools.accumulate(tensor.numel() for tensor in scores)
    pieces = [chosen[end - tensor.numel() : end] for tensor, end in zip(scores, ends, strict=True)]
    return [pack(piece.to(tensor.device)) for piece, tensor in zip(pieces, scores, strict=True)]


def refuse_nan(name: str) -> NoReturn:
    """Raises the ValueError for scores that have a NaN."""
    raise ValueError(f"scores must not be NaN (got one or more for '{name}'); find the batch that made them")
