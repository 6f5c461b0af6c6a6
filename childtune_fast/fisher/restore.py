"""Restores a model and the global random states after work that changes them, also when that work raises."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np  # for its global random state, which a user's data set or model may draw from
import torch
from torch import Tensor, nn

from ..ops.fsdp import fsdp_modules, reset
from ..ops.tensor_parts import copied, overwrite, same_bits

_Restorers = list[tuple[str, Callable[[], object]]]  # what is restored, for a warning, and the function that does it


@contextlib.contextmanager
def leaving_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores training flags, buffers, gradients (as the same objects) and random states when the context ends.

    What fully_shard() has sharded is sharded again then.

    The random states are torch's on the CPU and on CUDA, Python's and numpy's. When the context begins, the gradient of
    every parameter is set to None. What then cannot be restored, for a reason that arose in between, is told by a
    warning, so that the rest is restored and the result of the work is not lost.

    Raises:
        ValueError: a buffer is of a kind that could not be restored; nothing has been changed then.
    """
    restorers = [*_shards(model), *_training_flags(model), *_buffers(model), *_gradients(model), *_random_states()]
    try:
        for param in model.parameters():
            param.grad = None
        yield
    finally:
        _run_all(restorers)


def _run_all(restorers: _Restorers) -> None:
    failed = [f"{what} ({error})" for what, restore in restorers if (error := _error_of(restore))]
    if failed:
        warnings.warn(
            f"Fisher scores: the model must be left as it was (could not restore {'; '.join(failed)}); the scores are "
            "valid, but load the model anew",
            stacklevel=5,  # the caller of estimate_fisher
        )


def _error_of(restore: Callable[[], object]) -> str:
    """Runs a function; returns the error that it raised as text, or ""."""
    try:
        restore()
    except Exception as error:  # an override of train(), or torch for a tensor that was moved, may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _random_states() -> _Restorers:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    states: _Restorers = [
        ("Python's random state", partial(random.setstate, python)),
        ("numpy's random state", partial(np.random.set_state, numpy)),
        ("torch's random state", partial(torch.set_rng_state, cpu)),
    ]
    if torch.cuda.is_initialized():
        states.append(("CUDA's random states", partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())))
    return states


def _gradients(model: nn.Module) -> _Restorers:
    named = model.named_parameters()
    return [(f"the gradient of '{name}'", partial(setattr, param, "grad", param.grad)) for name, param in named]


def _shards(model: nn.Module) -> _Restorers:
    return [("the shards", partial(reset, model))] if fsdp_modules(model) else []


def _training_flags(model: nn.Module) -> _Restorers:
    before = model.training

    def switch() -> None:
        if model.training != before:
            model.train(before)  # some classes override train() and do more than set flags

    flags: _Restorers = [
        (f"training of '{name}'", partial(setattr, module, "training", module.training))
        for name, module in model.named_modules()
    ]
    return [("the mode by train()", switch), *flags]


def _buffers(model: nn.Module) -> _Restorers:
    """Returns what restores each buffer, such as batch norm's statistics: the object and its values.

    Raises:
        ValueError: a buffer cannot be copied.
    """
    restorers: _Restorers = []
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full_name = f"{prefix}.{name}" if prefix else name
            try:
                with torch.inference_mode(False):  # copies made in inference mode could not be used outside of it
                    values = None if buffer is None else copied(buffer)
            except Exception as error:  # torch may raise anything for a tensor of a kind that it hardly knows
                raise ValueError(
                    "Fisher scores: buffers must be of a kind that can be restored after the work (got "
                    f"'{full_name}': {error}); replace it by one of another kind"
                ) from error
            restorers.append((f"buffer '{full_name}'", partial(_put_back, module, name, buffer, values)))
    return restorers


def _put_back(module: nn.Module, name: str, buffer: Tensor | None, values: Tensor | None) -> None:
    module._buffers[name] = buffer
    if buffer is not None and values is not None and not same_bits(buffer, values):
        overwrite(buffer, values)  # only if it has changed, because autograd counts every write as a change
