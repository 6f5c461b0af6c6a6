"""Restores weights that a loss writes, as Embedding's max_norm or an initialisation by the first batch does."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.tensor_parts import copied, kind_of, overwrite, parts, raw, same_bits
from .restorers import Restorers
from .watch import Mode


class Weights:
    """Keeps what a model's parameters are, at the memory of those alone that are written.

    Before an operation of the first batch writes into a parameter's memory, the parameter is copied. If that happened,
    the later batches are watched as well. Watching costs some microseconds an operation, too much for every batch.
    What is written unwatched is found at the end, from sums over the bits of all parameters.

    Args:
        model: module whose parameters are kept.

    Raises:
        ValueError: a parameter has not been initialised, as those of lazy modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params = dict(model.named_parameters())
        for name, param in self._params.items():
            if kind_of(param) == "uninitialized":
                raise ValueError(
                    f"Fisher scores: parameters must be initialised (got '{name}', which the first forward pass would "
                    "initialise); run the model on one batch before"
                )
        self._copies: dict[str, Tensor] = {}
        self._first = True
        self._written = False
        with torch.inference_mode(False), torch.no_grad():  # copies of inference mode could not be used outside of it
            self._memory = {name: param.detach() for name, param in self._params.items()}
            self._sums = {name: sums for name, tensor in self._memory.items() if (sums := _sums(tensor)) is not None}
            self._names_at: dict[int, list[str]] = {}
            for name in self._sums:
                for address in _addresses(self._memory[name]):
                    self._names_at.setdefault(address, []).append(name)
        for module in model.modules():  # known to write, and the kernels that torch.compile makes are not seen to
            if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self._keep(module.weight)

    def watched(self) -> AbstractContextManager[object]:
        """Returns a context for the work on one batch."""
        watch = self._first or self._written
        self._first = False
        return self._watching() if watch else contextlib.nullcontext()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        known = len(self._copies)
        with _Watch(self._keep):  # which this object must not hold, for both would outlive their use
            yield
        self._written |= len(self._copies) > known

    def _keep(self, tensor: Tensor) -> None:
        """Copies the parameters in a tensor's memory, which is about to be written for the first time."""
        for address in _addresses(tensor):
            for name in self._names_at.pop(address, ()):
                with torch.inference_mode(False), torch.no_grad():
                    self._copies[name] = copied(self._memory[name])

    def restorers(self) -> Restorers:
        """Returns what restores each parameter's memory and values."""
        return [(f"weight '{name}'", partial(self._put_back, name)) for name in self._params]

    @torch.inference_mode(False)
    def _put_back(self, name: str) -> None:
        param, memory, values = self._params[name], self._memory[name], self._copies.get(name)
        if kind_of(memory) == "" and _place(param) != _place(memory):
            param.data = memory
        if values is not None and not same_bits(param, values):
            overwrite(param, values)

    def check(self) -> None:
        """Raises ValueError if a parameter that has not been copied was written; to be called after all is restored."""
        with torch.inference_mode(False), torch.no_grad():
            changed = [name for name, sums in self._sums.items() if _sums(self._params[name]) != sums]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                "Fisher scores: a loss must write weights in the first batch and by torch's operations, so that they "
                f"can be restored (got others in '{changed[0]}'{more}); load the model anew, and write them elsewhere, "
                "such as after the optimizer's step, or estimate before torch.compile"
            )


class _Watch(Mode):
    """Tells a function of every tensor that an operation is about to write."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # operators of higher order have none
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[i] if i < len(args) else kwargs.get(argument.name)
                    for tensor in written if isinstance(written, (list, tuple)) else [written]:
                        if isinstance(tensor, Tensor):
                            self._tell(tensor)
        return func(*args, **kwargs)


def _addresses(tensor: Tensor) -> set[int]:
    """Returns where the memory begins that holds a tensor's values; none if that cannot be reached."""
    try:
        return {part.untyped_storage().data_ptr() for part in parts(tensor).values()} - {0}
    except Exception:  # torch may raise anything for a tensor of a kind that it hardly knows
        return set()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if kind_of(tensor):
        return ()
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()


def _sums(tensor: Tensor) -> Any:
    """Returns sums over a tensor's bits, which hardly any change leaves alone; None if they cannot be reached."""
    try:
        return [total for part in parts(tensor).values() for total in _sums_of_bytes(raw(part))]
    except Exception:  # as above
        return None


def _sums_of_bytes(values: Tensor) -> list[Tensor]:
    if values.storage_offset() % 8:
        values = values.clone()
    whole = values.numel() // 8 * 8  # in words of 8 bytes, which takes a fraction of the time
    return [piece.sum() for piece in (values[:whole].view(torch.int64), values[whole:]) if piece.numel()]
