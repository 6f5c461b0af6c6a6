"""Our own backward passes of losses: each gradient is handed on as soon as it is complete, and freed."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .sums import SquareSums

Take = Callable[[str, Tensor], None]  # takes the name of a scored parameter and its gradient

_UNKNOWN = -2  # beside the numbers that torch gives to backward passes, from 0 on, and -1 for none


class Backward:
    """Takes backward passes, and frees the gradient of every parameter of a model as soon as it is complete.

    Backward passes that somebody else takes, inside of a loss function, go on as usual; what they leave in `grad` is
    dropped. A backward pass that begins within ours, as that of a reentrant checkpoint or of a loss that computes its
    gradient in a hook, may reach a parameter many times. Its gradients are kept until ours has ended.

    Args:
        model: module of the parameters.
        sums: what names the scored ones, and knows the gradients of sharded ones.
    """

    def __init__(self, model: nn.Module, sums: SquareSums) -> None:
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._names = {param: name for name, param in sums.params.items()}
        self._sums = sums
        self._take: Take | None = None
        self._ours = _UNKNOWN  # the number of our own backward pass
        self._kept: dict[Parameter, None] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Registers the hooks on the parameters that all backward passes need."""
        handles = [param.register_post_accumulate_grad_hook(self._arrive) for param in self._params]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, loss: Tensor, take: Take) -> None:
        """Takes the backward pass of a loss.

        Args:
            loss: tensor of one number.
            take: called with the name and the gradient of each scored parameter that has one, under no_grad.
        """

        def note(_: Tensor) -> None:
            self._ours = torch._C._current_graph_task_id()

        for param in self._params:
            param.grad = None
        handle = loss.register_hook(note)
        self._take, self._ours = take, _UNKNOWN  # until the loss has its gradient: a hook on it may begin a pass before
        try:
            loss.backward()
            for param in self._kept:
                self._hand_on(param)
        finally:
            handle.remove()
            self._kept.clear()
            self._take = None

    def _arrive(self, param: Parameter) -> None:
        if self._take is None:  # a backward pass inside of a loss
            return
        if self._ours == torch._C._current_graph_task_id() and param not in self._kept:
            self._hand_on(param)
        else:
            self._kept[param] = None

    @torch.no_grad()
    def _hand_on(self, param: Parameter) -> None:
        name = self._names.get(param)
        grad = None if name is None else self._sums.gradient(name)
        param.grad = None
        if name is not None and grad is not None and self._take is not None:
            self._take(name, grad)
