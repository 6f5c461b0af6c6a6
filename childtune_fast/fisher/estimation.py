"""One pass over the data that adds up squared gradients: of batches, or of their examples."""

import contextlib
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import is_sharded
from .backward import Backward
from .by_example import ByExample, Part
from .examples import PerExampleGrads, examples_in, tensors_of, with_tensors
from .graph import LARGE, NotCovered
from .loss import check_finite, check_loss, explaining_loss
from .rules import Gradient, Rows
from .sums import SquareSums
from .together import NotFiniteError

LossFn = Callable[[nn.Module, Any], Tensor]
OnNonfinite = Literal["raise", "skip"]
Finite = dict[str, bool | Tensor]  # {parameter name: whether its gradient is finite}


class Estimation:
    """Adds up the squared gradients of one estimation.

    Attributes:
        count: number of batches or examples whose gradients have been squared.
        left_out: which ones were left out, because a loss or a gradient was not finite.
    """

    def __init__(self, model: nn.Module, loss: LossFn, sums: SquareSums, on_nonfinite: OnNonfinite) -> None:
        self.model = model
        self.loss = loss
        self.sums = sums
        self.on_nonfinite = on_nonfinite
        if on_nonfinite == "skip":
            sums.stage()
        self.kernels = sums.kernels()  # found once for the whole estimation, not for each gradient
        self.backward = Backward(model, sums)
        self.device = _device_of(next(iter(sums.params.values())))
        self.by_example: ByExample | None = ByExample(model, sums.params, self.backward)
        self.by_vmap = PerExampleGrads(model, sums.params, loss)
        self.count = 0
        self.left_out: list[str] = []

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Registers the hooks on the model that all passes need."""
        handles = self.sums.ranks.hooks(self.model)
        try:
            with self.backward.hooks():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def whole(self, index: int, batch: Any, where: str = "") -> None:
        """Adds the squared gradient of one loss: that of batch number `index`, or of one example in it."""
        where = where or f"batch {index}"
        with self._counting(1, where):
            loss = self.sums.ranks.loss(partial(self._loss_of, batch, where))
            finite: Finite = {}
            self.backward(loss, partial(self._square, finite))
            self.sums.close(finite, 1.0, f"estimate_fisher: {where}: ")

    def _square(self, finite: Finite, name: str, grad: Tensor) -> None:
        if name in finite:  # the first part of its gradient is already squared and freed
            raise RuntimeError(
                f"estimate_fisher: a backward pass within the backward pass must come first (it reached '{name}' after "
                "its gradient was complete); let the hook that begins it run before those of the parameters"
            )
        finite[name] = self.sums.add(self.kernels, name, grad)

    def _loss_of(self, batch: Any, where: str) -> Tensor:
        with explaining_loss(self.model, self.loss, batch, where):
            loss = self.loss(self.model, batch)
            check_loss(loss, where)
        check_finite(loss, batch, where)
        return loss

    @contextlib.contextmanager
    def _counting(self, number: int, where: str) -> Iterator[None]:
        """Counts what is added in the context; leaves it out if it is not finite, and that is allowed."""
        try:
            yield
        except NotFiniteError:
            if self.on_nonfinite == "raise":
                raise
            self.sums.drop()
            if number > 1:
                raise  # to go on with its examples, one at a time
            self.left_out.append(where)
        else:
            self.sums.keep()
            self.count += number

    def check_count(self) -> None:
        """Raises ValueError if nothing has been squared, and warns if something was left out."""
        if not self.count and not self.left_out:
            raise ValueError("estimate_fisher: dataloader must yield at least one batch (got none)")
        if self.left_out:
            text = (
                f"estimate_fisher: {len(self.left_out)} of {self.count + len(self.left_out)} were left out, whose loss "
                f"or gradient is not finite: {textwrap.shorten('; '.join(self.left_out), 200)}"
            )
            if not self.count:
                raise ValueError(f"{text}; look for the cause in the data or the loss")
            warnings.warn(text, stacklevel=3)

    # ---- The gradients of single examples ----------------------------------------------------------------------------

    def examples(self, index: int, batch: Any) -> None:
        """Adds the squared gradient of the loss of each example in batch number `index`."""
        tensors = tensors_of(batch)
        with self.sums.ranks.agreeing():
            total = examples_in(tensors, index)
        done = 0
        if total >= LARGE and not self.sums.ranks.meshes:  # neither way knows DTensors
            done = self._at_once(index, batch, tensors, total)
            done = done or self._by_vmap(index, batch, tensors)
        for i in range(done, total):
            one = with_tensors(batch, [tensor[i : i + 1] for tensor in tensors])
            self.whole(index, one, f"batch {index}, example {i}")

    def _at_once(self, index: int, batch: Any, tensors: list[Tensor], total: int) -> int:
        """Adds the squares of the first examples, part by part of the batch, and returns their number."""

        def loss(begin: int, end: int) -> Tensor:
            part = with_tensors(batch, [tensor[begin:end] for tensor in tensors])
            if end - begin > 1:  # a number that no example's gradient depends on
                return self.loss(self.model, part)
            return self._loss_of(part, f"batch {index}, example {begin}")

        done, size = 0, total
        try:
            while self.by_example is not None and total - done > 1:
                part = self.by_example.part(done, min(done + size, total), loss)
                if part is None:
                    break
                self._add_part(index, self.by_example, part)
                done, size = done + part.examples, part.examples
        except NotFiniteError:
            if self.on_nonfinite == "raise":
                raise
        except NotCovered as error:
            self.by_example = None
            warnings.warn(
                "estimate_fisher: the gradients of examples are computed in a slower way, since the backward pass of a "
                f"batch cannot be taken apart ({error})",
                stacklevel=4,
            )
        return done

    def _add_part(self, index: int, by_example: ByExample, part: Part) -> None:
        finite: dict[int, Finite] = defaultdict(dict)

        def add(name: str, example: int, grad: Gradient) -> None:
            if isinstance(grad, Rows):
                finite[example][name] = self.sums.add_rows(self.kernels, name, grad.indices, grad.values)
            else:
                finite[example][name] = self.sums.add(self.kernels, name, grad)

        with self._counting(part.examples, f"batch {index}"):
            by_example.finish(part, add)
            for example in range(part.begin, part.begin + part.examples):
                self.sums.close(finite[example], 1.0, f"estimate_fisher: batch {index}, example {example}: ")

    def _by_vmap(self, index: int, batch: Any, tensors: list[Tensor]) -> int:
        """Adds the squares of the first examples by `torch.func.vmap`, and returns their number."""
        done = 0
        if self.on_nonfinite == "raise" and self.by_example is None and self.by_vmap.worthwhile:
            for losses, grads in self.by_vmap.of_batch(batch, tensors):
                check_finite(losses, batch, f"batch {index}")
                for of_one in grads:
                    where = f"batch {index}, example {done}"
                    with self._counting(1, where):
                        finite = {name: self.sums.add(self.kernels, name, grad) for name, grad in of_one.items()}
                        self.sums.close(finite, 1.0, f"estimate_fisher: {where}: ")
                    done += 1
        return done


def _device_of(param: Any) -> Any:
    """Returns the device that computes with a parameter; under FSDP2's CPU offload not the one that holds it."""
    if is_sharded(param) and param.device.type != param.device_mesh.device_type:
        return torch.device(param.device_mesh.device_type)
    return param.device
