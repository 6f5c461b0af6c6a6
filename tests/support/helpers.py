"""Helpers of the optimizer's tests: both backends, comparison by bits, small parameters with given gradients."""

import copy

import pytest
import torch

from childtune_fast import ChildAdamW

both_backends = pytest.mark.parametrize("backend", ["native", "torch"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = ((5, 3), (129,), (), (0,), (2, 3, 4))


def raw(tensor):
    """The tensor's bits in logical order, as bytes: equal for equal NaNs, different for 0.0 and -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def make_params(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, step, scale=1.0):
    """Gives every parameter the gradient of the given step: a function of the step and of the parameter's position."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer, steps):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def snapshot(optimizer):
    """Everything that a step may change, copied: parameters, gradients, state with its keys."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in params]
    return tensors, copy.deepcopy([dict(optimizer.state[p]) if p in optimizer.state else None for p in params])


def same_snapshot(a, b):
    return _same(a[0], b[0]) and _same(a[1], b[1])


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.layout != torch.strided or a.device.type == "meta":
            return a.layout == b.layout and a.device == b.device and a.shape == b.shape
        return same_bits(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def assert_same_run(a, b):
    """Asserts that two optimizers hold the same parameters and the same state, bit for bit, however they count steps.

    A GPU that counts does so in float64, the host in float32.
    """
    (tensors_a, states_a), (tensors_b, states_b) = snapshot(a), snapshot(b)
    for i, (x, y) in enumerate(zip(tensors_a, tensors_b, strict=True)):
        assert same_bits(x[0], y[0]), f"parameter {i} differs"
    for i, (x, y) in enumerate(zip(states_a, states_b, strict=True)):
        for state in (x, y):
            if state and "step" in state:
                state["step"] = float(state["step"])
        assert _same(x, y), f"state of parameter {i} differs"


def child_adamw(params, **options):
    """A ChildAdamW whose masks do not depend on torch's seed."""
    return ChildAdamW(params, **{"seed": 7, **options})
