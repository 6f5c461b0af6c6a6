"""Leaves a model and the global random state as they were found, also when the work in between raises."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np  # its global state, which a user's code may draw from
import torch
from torch import nn


@contextlib.contextmanager
def leaving_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores, at its end: training flags, buffers, gradients (the same objects), and random states.

    Random states are torch's on the CPU and on CUDA, Python's and numpy's. Within, parameters begin without gradients.
    """
    with contextlib.ExitStack() as stack:
        for restored in (_random_states(), _gradients(model), _buffers(model), _training_flags(model)):
            stack.enter_context(restored)
        yield


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    before = [(param, param.grad) for param in model.parameters()]
    try:
        for param, _ in before:
            param.grad = None
        yield
    finally:
        for param, grad in before:
            param.grad = grad


@contextlib.contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    """Batch norm's statistics, for one. What has not changed is not written: autograd would take it for changed."""
    before = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                module._buffers[name] = buffer
                if buffer is not None and values is not None and not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextlib.contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        if model.training != before[0][1]:
            model.train(before[0][1])  # some classes do more in it than set flags
        for module, training in before:
            module.training = training
