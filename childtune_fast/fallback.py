"""The step in pure torch, on any device: the readable specification of the compiled kernels, with the same bits.

Each line rounds as csrc/core does: no fused multiply-add, no reciprocal, constants computed in double and rounded once.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import compute_dtype
from .mask import KEEP_ALL, bernoulli_mask
from .packed_mask import unpack
from .step_group import StepGroup

_NORM_CHUNK = 1024


class AdamWConstants(NamedTuple):
    """Everything in a step that does not depend on the element. csrc/core/constants.h, line by line."""

    grad_factor: float
    decay_before: float
    step_size: float
    bias_correction2_sqrt: float
    decay_after: float


def integer_power(base: float, exponent: int) -> float:
    """`base**exponent` by repeated squaring, which has the same bits on every machine (libm's `pow` has not)."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def step_constants(group: StepGroup, step: int) -> AdamWConstants:
    """Computes the constants of the step number `step`, 1 for the first, in double."""
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
    param, grad, exp_avg, exp_avg_sq = group.params[i], group.grads[i], group.exp_avgs[i], group.exp_avg_sqs[i]
    step = int(group.steps[i].item()) + 1
    c = step_constants(group, step)

    child = unpack(group.child_bits[i], param.shape) if group.child_bits else None
    weights = param
    if child is not None:  # from here on, `weights` and `grad` are the child network's, and so is the state
        weights, grad = param[child], grad[child]
        if group.decay_outside:
            param.copy_(param.to(exp_avg.dtype) * c.decay_before * c.decay_after)

    grad = grad.to(exp_avg.dtype) * c.grad_factor
    if group.keep_threshold < KEEP_ALL:
        grad = torch.where(_mask(group, i, step), grad, 0.0)
    exp_avg.copy_(exp_avg * group.beta1 + grad * (1 - group.beta1))
    exp_avg_sq.copy_(exp_avg_sq * group.beta2 + grad * (1 - group.beta2) * grad)
    second_moment = exp_avg_sq
    if group.amsgrad:
        second_moment = group.max_exp_avg_sqs[i]
        second_moment.copy_(torch.where(exp_avg_sq <= second_moment, second_moment, exp_avg_sq))
    # A divisor in a tensor on the device: by a number, torch multiplies with the reciprocal on CUDA.
    bias_correction2_sqrt = torch.full((), c.bias_correction2_sqrt, dtype=exp_avg.dtype, device=exp_avg.device)
    denom = _sqrt(second_moment) / bias_correction2_sqrt + group.eps
    decayed = weights.to(exp_avg.dtype) * c.decay_before
    updated = (decayed - exp_avg * c.step_size / denom) * c.decay_after
    if child is None:
        param.copy_(updated)
    else:
        param[child] = updated.to(param.dtype)
    group.steps[i].fill_(step)


def _mask(group: StepGroup, i: int, step: int) -> Tensor:
    """The mask of a parameter, or of the part of a sharded one that is here."""
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
    """The correctly rounded square root. torch's own on the CPU is off by an ulp for a tenth of all floats (MKL's)."""
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.is_cpu else torch.sqrt(x)


def sum_of_squares(tensors: list[Tensor], child_bits: list[Tensor | None]) -> float:
    """Returns the sum of the squares of all elements, in double and in a fixed order.

    `child_bits` has, for each tensor, the mask of the elements that count; None if all do. The others count as zero.

    Per tensor: chunks of 1024 elements in logical order, summed by halving; the chunks' sums likewise, as if padded
    with zeros to a power of two; then one tensor after the other.
    """
    totals: list[Tensor] = []
    for tensor, bits in zip(tensors, child_bits, strict=True):
        if tensor.numel() == 0:
            continue
        squares = tensor.double().square()
        if bits is not None:
            squares = torch.where(unpack(bits, tensor.shape), squares, 0.0)
        squares = squares.flatten()
        chunks = -(-squares.numel() // _NORM_CHUNK)
        padded = torch.nn.functional.pad(squares, (0, chunks * _NORM_CHUNK - squares.numel()))
        sums = _sum_by_halving(padded.view(chunks, _NORM_CHUNK))
        sums = torch.nn.functional.pad(sums, (0, (1 << (chunks - 1).bit_length()) - chunks))
        totals.append(_sum_by_halving(sums))
    return sum(numbers(totals), 0.0)


def numbers(scalars: list[Tensor]) -> list[float]:
    """Returns the values of 0-dim tensors; of all on one device at once, since each time the host waits for it."""
    values: dict[int, float] = {}
    for device in {scalar.device for scalar in scalars}:
        of_device = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        values.update(zip(of_device, torch.stack([scalars[i] for i in of_device]).tolist(), strict=True))
    return [values[i] for i in range(len(scalars))]


def _sum_by_halving(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x.squeeze(-1)


def accumulate_squares(score: Tensor, grad: Tensor, weight: float, grad_factor: float) -> Tensor:
    """Adds `weight * (grad * grad_factor)**2` to the float32 tensor `score`, in place. csrc/core/fisher.h in torch.

    Returns:
        Whether every gradient was finite, as a bool tensor on its device.
    """
    dtype = compute_dtype(grad)
    scaled = grad.to(dtype) * grad_factor
    score.copy_(score.to(dtype) + scaled * weight * scaled)
    return torch.isfinite(grad).all()
