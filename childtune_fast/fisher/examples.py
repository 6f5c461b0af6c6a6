"""The examples of a batch: the tensors in any nesting of mappings and lists, and the gradient of each example."""

import copy
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 256 * 2**20  # limit of the gradients that a chunk of examples has in memory at once


class PerExampleGrads:
    """Computes the gradients of single examples, several at once through `torch.func.vmap`.

    Args:
        model: module that the loss is computed with.
        params: {name: parameter of the model}, those to differentiate by.
        loss: function of (model, batch) that returns the loss, a tensor of one number.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], loss: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self._loss = _Loss(model, loss)
        self._params = {f"model.{name}": param for name, param in params.items()}
        size = sum(param.numel() * param.element_size() for param in params.values())
        self._chunk = _CHUNK_BYTES // max(size, 1)  # number of examples

    @property
    def worthwhile(self) -> bool:
        """Whether a chunk holds more than one example; always False after vmap has failed."""
        return self._chunk > 1

    def of_batch(self, batch: Any, tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        """Yields, for each chunk of examples, their losses and a list of their gradients, {parameter name: gradient}.

        If vmap fails, it warns with the reason and ends early; the caller must do the examples that were not yielded.

        Args:
            batch: the batch, of any nesting, that the loss takes.
            tensors: the tensors in the batch, in the order of `tensors_of`, with the examples in dimension 0.
        """

        def loss_of_one(params: dict[str, Tensor], example: list[Tensor]) -> Tensor:
            one = with_tensors(batch, [tensor.unsqueeze(0) for tensor in example])
            return torch.func.functional_call(self._loss, params, (one,))

        gradients = torch.func.vmap(torch.func.grad_and_value(loss_of_one), (None, 0), randomness="different")
        params = {name: param.detach() for name, param in self._params.items()}
        for begin in range(0, tensors[0].shape[0], self._chunk):
            chunk = [tensor[begin : begin + self._chunk] for tensor in tensors]
            try:
                with torch.no_grad():  # otherwise autograd would record how the gradients are computed
                    grads, losses = gradients(params, chunk)
            except Exception as error:  # under vmap, torch and the model may raise any exception
                self._chunk = 0
                reason = textwrap.shorten(str(error), 200)
                warnings.warn(
                    "estimate_fisher: per-example gradients are taken one example at a time, since torch.func.vmap "
                    f"cannot run this model ({type(error).__name__}: {reason})",
                    stacklevel=5,
                )
                return
            names = [(name, name.removeprefix("model.")) for name in grads]
            yield losses, [{short: grads[name][i] for name, short in names} for i in range(len(losses))]


class _Loss(nn.Module):
    """Wraps model and loss in one module, which `torch.func.functional_call` requires."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


# ---- Batches of any nesting ----------------------------------------------------------------------------------------


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of the batch in which `change(tensor)` replaces each tensor, always in the same order.

    Mappings, lists, tuples and named tuples are copied, at every depth. All other values that are no tensors are shared
    with the batch.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)  # keeps the class: a transformers BatchEncoding also has attributes
        for key, value in batch.items():
            changed[key] = map_tensors(value, change)
        return changed
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """Returns every tensor in the batch, in the order in which `map_tensors` visits them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def with_tensors(batch: Any, tensors: list[Tensor]) -> Any:
    """Returns a copy of the batch in which `tensors`, in the order of `tensors_of`, replace its own tensors."""
    remaining = iter(tensors)
    return map_tensors(batch, lambda _: next(remaining))


def examples_in(tensors: list[Tensor], index: int) -> int:
    """Returns how many examples the tensors of batch number `index` hold: their size in dimension 0.

    Raises:
        ValueError: there is no tensor, a tensor has no dimensions, or their sizes differ.
    """
    sizes = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors}
    if len(sizes) != 1 or -1 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        remedy = "change the batch, or use batches of one example and per_example=False"
        remedy = remedy if tensors else "pass a DataLoader with a collate_fn that makes tensors"
        raise ValueError(
            f"estimate_fisher: batch {index}: with per_example=True every tensor must have the examples in dimension 0 "
            f"(got {shapes}); {remedy}"
        )
    return sizes.pop()
