"""Restores a model, a DataLoader and random states after work that changes them, also when that work raises."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fsdp import fsdp_modules, reset
from ..ops.tensor_parts import copied, overwrite, same_bits
from .random_states import global_states, held_states, module_states, set_iterators_aside
from .restorers import Restorers, contents, run_all
from .weights import Weights


@contextlib.contextmanager
def leaving_as_it_was(model: nn.Module, dataloader: Iterable[Any]) -> Iterator[Weights]:
    """Restores a model, random states and a DataLoader when the context ends.

    Of the model: weights, buffers and gradients (as the same objects with the same values), the attributes of all its
    modules, such as training flags, and what fully_shard() has sharded. The random states are the global ones of torch,
    Python and numpy, and those of generators that a module or the DataLoader holds, itself or in its samplers, dataset
    or collate_fn. The order of data is then as it would have been. Lists and the like that modules hold are restored as
    objects, but not their entries. An iterator cannot be restored.

    When the context begins, the gradient of every parameter is set to None. What then cannot be restored, for a reason
    that arose in between, is told by a warning, so that the rest is restored and the result of the work is not lost.

    Yields:
        The weights: the work on each batch must be done within `watched()`, and `check()` must be called after the
        context, to find those that could not be restored.

    Raises:
        ValueError: a buffer or parameter is of a kind that could not be restored; nothing has been changed then.
    """
    weights = Weights(model)
    holders, modules = [dataloader], list(model.modules())
    restorers = [
        *_shards(model),
        *_training_flags(model),
        *_attributes(model),
        *_buffers(model),
        *weights.restorers(),
        *_gradients(model),
        *held_states(holders, without=modules),
        *module_states(model),
        *global_states(),
    ]
    try:
        set_iterators_aside(holders, without=modules)
        for param in model.parameters():
            param.grad = None
        yield weights
    except BaseException:
        restorers.append(("all weights", weights.check))  # nobody else will call it
        raise
    finally:
        run_all(restorers)


@contextlib.contextmanager
def leaving_random_states(*holders: object, without: nn.Module) -> Iterator[None]:
    """Restores the global random states, and those of generators that objects hold, when the context ends.

    Args:
        holders: the objects; see `held_states`.
        without: a model, whose modules are not looked into.
    """
    restorers = [*held_states(holders, without=without.modules()), *global_states()]
    try:
        yield
    finally:
        run_all(restorers)


def _gradients(model: nn.Module) -> Restorers:
    named = model.named_parameters()
    return [(f"the gradient of '{name}'", partial(setattr, param, "grad", param.grad)) for name, param in named]


def _shards(model: nn.Module) -> Restorers:
    return [("the shards", partial(reset, model))] if fsdp_modules(model) else []


def _training_flags(model: nn.Module) -> Restorers:
    before = model.training

    def switch() -> None:
        if model.training != before:
            model.train(before)  # some classes override train() and do more than set flags

    flags: Restorers = [
        (f"training of '{name}'", partial(setattr, module, "training", module.training))
        for name, module in model.named_modules()
    ]
    return [("the mode by train()", switch), *flags]


def _attributes(model: nn.Module) -> Restorers:
    """Returns what restores each module's attributes, parameters, buffers and modules, as the same objects."""
    attributes: Restorers = []
    for name, module in model.named_modules():
        registries = (module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set)
        held = [entries for entries in registries if isinstance(entries, (dict, set))]  # in TorchScript they are others
        attributes += [(f"attributes of '{name}'", contents(entries)) for entries in (*held, vars(module))]
    return attributes


def _buffers(model: nn.Module) -> Restorers:
    """Returns what restores each buffer, such as batch norm's statistics: the object and its values.

    Raises:
        ValueError: a buffer cannot be copied.
    """
    restorers: Restorers = []
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
