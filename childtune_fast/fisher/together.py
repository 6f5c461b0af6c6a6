"""Ranks that hold parts of one model go on together, or raise together."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..arguments import is_sharded
from ..ops.fsdp import fsdp_modules

_T = TypeVar("_T")
_END = object()


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite."""


# What other ranks raise, too; a RuntimeError for the rest.
_CLASSES = {"ValueError": ValueError, "TypeError": TypeError, "NotFiniteError": NotFiniteError}


class Together:
    """The ranks that hold parts of a model. They agree wherever one of them may raise and the others would go on.

    Those would wait in the model's next collective for the one that raised. An agreement is one small collective. On a
    model without DTensors, where no rank waits for another one, there is none, and every method does nothing more.

    What a rank raises inside of the model's own forward or backward pass is not agreed on, since the others may be
    waiting in there already.

    Attributes:
        meshes: the meshes that the model's parameters lie on; none if all are whole.
    """

    def __init__(self, model: nn.Module) -> None:
        found: Iterable[Any] = (param for param in model.parameters() if is_sharded(param))
        self.meshes = tuple(dict.fromkeys(param.device_mesh for param in found))
        self._entered = False
        self._inside = 0

    def worst(self, number: int) -> int:
        """Returns the greatest of the ranks' numbers."""
        if not self.meshes:
            return number
        from ..ops.ranks import worst

        return worst(number, self.meshes)

    def agreeing(self) -> AbstractContextManager[None]:
        """Returns a context at whose end all ranks raise if one of them did in it: that one the same error as ever.

        The others raise a ValueError or TypeError, as that one did, or else a RuntimeError, with its words.
        """
        return self._agreeing() if self.meshes else contextlib.nullcontext()

    @contextlib.contextmanager
    def _agreeing(self) -> Iterator[None]:
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        self._agree(failed)

    def _agree(self, failed: Exception | None) -> None:
        if not self.worst(int(failed is not None)):
            return
        from ..ops.ranks import told

        kind, text = told(None if failed is None else (type(failed).__name__, str(failed)), self.meshes)
        if failed is not None:
            raise failed
        raise _CLASSES.get(kind, RuntimeError)(
            f"Fisher scores: all ranks must go on together (another raised {kind}: {text}); look for the cause there"
        )

    def batches(self, batches: Iterator[_T]) -> Iterator[_T]:
        """Returns the batches, as long as every rank has one.

        Raises:
            ValueError: a rank has fewer batches than another one.
        """
        return self._batches(batches) if self.meshes else batches

    def _batches(self, batches: Iterator[_T]) -> Iterator[_T]:
        for count in itertools.count():
            batch: Any = _END
            failed = None
            try:
                batch = next(batches, _END)
            except Exception as error:
                failed = error
            if self.worst(int(batch is _END)):
                self._agree(failed)
                if self.worst(int(batch is not _END)):
                    got = f"{count} here, more on another" if batch is _END else f"more here, {count} on another"
                    remedy = f"pass max_batches={count}, or " if count else ""
                    raise ValueError(
                        "estimate_fisher: dataloader must yield the same number of batches on every rank (got "
                        f"{got}); {remedy}use a sampler that deals out equal parts"
                    )
                return
            yield batch

    # ---- The loss ----------------------------------------------------------------------------------------------------

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the loss that a function computes. The ranks agree where it enters the model, and at its end."""
        if not self.meshes:
            return compute()
        self._entered, self._inside = False, 0
        try:
            loss = compute()
        except Exception as error:
            if not self._inside:  # else others may wait inside of the model
                self._agree(error)
            raise
        if not self._entered:  # others may have, and agree there
            self._agree(None)
        self._agree(None)
        return loss

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers what tells `loss` where the model is entered: before any collective of its forward pass."""
        if not self.meshes:
            return []
        sharded = set(fsdp_modules(model))
        handles = []
        for module in model.modules():
            if module is model or module in sharded or any(map(is_sharded, module.parameters(recurse=False))):
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave))
        return handles

    def _enter(self, *_: Any) -> None:
        self._inside += 1
        if not self._entered:
            self._entered = True
            self._agree(None)

    def _leave(self, *_: Any) -> None:
        self._inside -= 1
