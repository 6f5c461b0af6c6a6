"""The gradient of each example of a batch: `torch.func` in chunks, where that works and pays."""

import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import with_tensors

_CHUNK_BYTES = 256 * 2**20  # of gradients that a chunk holds at once


class PerExampleGrads:
    """Gradients of single examples, several at once through `torch.func.vmap`.

    Args:
        model: the model.
        params: which of its parameters to differentiate by, by name.
        loss: from (model, batch) to the loss.
    """

    def __init__(self, model: nn.Module, params: dict[str, Tensor], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self._loss = _Loss(model, loss)
        self._params = {f"model.{name}": param for name, param in params.items()}
        size = sum(param.numel() * param.element_size() for param in params.values())
        self._chunk = _CHUNK_BYTES // max(size, 1)  # examples

    @property
    def worthwhile(self) -> bool:
        """Whether a chunk holds more than one example; False for good once vmap has failed."""
        return self._chunk > 1

    def of_batch(self, batch: Any, tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        """Yields, for one chunk of examples after the other, their losses and their gradients by parameter name.

        Args:
            batch: what the loss takes.
            tensors: those in it, in order, with the examples in dimension 0.

        It ends early, with a warning that says why, where vmap fails; the examples not yielded remain to be done.
        """

        def loss_of_one(params: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            one = with_tensors(batch, [tensor.unsqueeze(0) for tensor in example])
            return torch.func.functional_call(self._loss, params, (one,))

        gradients = torch.func.vmap(torch.func.grad_and_value(loss_of_one), (None, 0), randomness="different")
        params = {name: param.detach() for name, param in self._params.items()}
        for begin in range(0, tensors[0].shape[0], self._chunk):
            chunk = [tensor[begin : begin + self._chunk] for tensor in tensors]
            try:
                with torch.no_grad():  # no second graph, of the gradient's own computation
                    grads, losses = gradients(params, chunk)
            except Exception as error:  # whatever torch, or the model, raises under vmap
                self._chunk = 0
                reason = textwrap.shorten(str(error), 200)
                warnings.warn(
                    "estimate_fisher: per-example gradients are taken one example at a time, since torch.func.vmap "
                    f"cannot run this model ({type(error).__name__}: {reason})",
                    stacklevel=4,
                )
                return
            names = [(name, name.removeprefix("model.")) for name in grads]
            yield losses, [{short: grads[name][i] for name, short in names} for i in range(len(losses))]


class _Loss(nn.Module):
    """The loss as a module of the batch, as `torch.func.functional_call` wants it."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)
