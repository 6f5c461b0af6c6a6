"""Restores a model and the global random states after work that changes them, also when that work raises."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np  # for its global random state, which a user's data set or model may draw from
import torch
from torch import nn


@contextlib.contextmanager
def leaving_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores training flags, buffers, gradients (as the same objects) and random states when the context ends.

    The random states are torch's on the CPU and on CUDA, Python's and numpy's. When the context begins, the gradient of
    every parameter is set to None.
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
    """Restores the buffers, such as batch norm's statistics.

    Writes only to buffers that have changed, because autograd counts every write as a change.
    """
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
            model.train(before[0][1])  # some classes override train() and do more than set flags
        for module, training in before:
            module.training = training
