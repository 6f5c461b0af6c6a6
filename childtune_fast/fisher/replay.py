"""The loss of each example of a batch, from one forward pass of the whole batch.

A batch's loss does not tell what its examples' losses are: a model or a loss function may divide by the number of
examples, or of tokens, or compare examples. So the loss function is called for each example, as if that were the whole
batch, while the modules whose outputs are one piece for each example do not compute: they return the example's piece of
what they have computed for the batch. The gradients with respect to the pieces, put together, are then what a backward
pass of the batch begins with.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .examples import map_tensors, tensors_of
from .graph import LARGE, SMALL, NotCovered
from .watch import Selections


class Call:
    """A call of a module in a forward pass: the module, the call that it was made in, or None, and what it returned."""

    def __init__(self, module: nn.Module, caller: "Call | None") -> None:
        self.module = module
        self.caller = caller
        self.output: Any = None
        self.selects = False  # whether it selects elements by their values
        self.versions: list[tuple[Tensor, int]] = []  # the tensors in the output, and how often they were written to


@contextlib.contextmanager
def calls_of(model: nn.Module, modules: list[nn.Module] | None = None) -> Iterator[list[Call]]:
    """Lists the calls of some modules of a model, or of all, that are made in the context, callers first.

    Whether a call selects elements by their values is noted only if all are listed.
    """
    calls: list[Call] = []
    inside: list[Call] = []

    def enter(module: nn.Module, *_: Any) -> None:
        inside.append(Call(module, inside[-1] if inside else None))
        calls.append(inside[-1])

    def selects() -> None:
        for call in inside:
            call.selects = True

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        call = inside.pop()
        call.output, call.versions = output, [(tensor, tensor._version) for tensor in tensors_of(output)]

    watched = contextlib.nullcontext() if modules is not None else Selections(selects)
    modules = list(model.modules()) if modules is None else modules
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        with watched:
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def separable(small: list[Call], large: list[Call]) -> list[nn.Module]:
    """Returns the outermost modules whose outputs are pieces for the examples, one after the other.

    Args:
        small: the calls of a forward pass of SMALL examples.
        large: those of LARGE examples, otherwise the same.

    Raises:
        NotCovered: the two are different calls, or no module is separable.
    """
    if [call.module for call in small] != [call.module for call in large]:
        raise NotCovered("the model calls other modules for another number of examples")
    whole = {id(few.module) for few, many in zip(small, large, strict=True) if not _is_separable(few, many)}
    chosen: list[nn.Module] = []
    for call in large:  # callers come first
        caller = call.caller
        while caller is not None and id(caller.module) in whole:
            caller = caller.caller
        if caller is None and id(call.module) not in whole and call.module not in chosen:
            chosen.append(call.module)
    if not chosen:
        raise NotCovered("no module of the model returns one piece for each example")
    if any(call.selects and call.module in chosen for call in large):
        raise NotCovered("the model selects elements by their values, perhaps more of one example than of another")
    return chosen


def _is_separable(small: Call, large: Call) -> bool:
    few, many = tensors_of(small.output), tensors_of(large.output)
    if not many or len(few) != len(many):
        return False
    return all(
        a.ndim > 0 and a.shape[1:] == b.shape[1:] and a.shape[0] * LARGE == b.shape[0] * SMALL
        for a, b in zip(few, many, strict=True)
    )


class Replay:
    """What some modules have computed for a batch, from which they answer calls for single examples.

    Args:
        outputs: {module whose outputs are pieces for the examples: what it has returned, call by call}.
        versions: the tensors in them, and how often each had been written to.
    """

    def __init__(self, outputs: dict[nn.Module, list[Any]], versions: list[tuple[Tensor, int]]) -> None:
        self._outputs = outputs
        self._versions = versions
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}  # {id of an output: it and its gradient}

    @classmethod
    def of(cls, modules: list[nn.Module], calls: list[Call]) -> "Replay":
        """Returns the replay of those calls of some modules that were not made within another one of them."""
        outputs: dict[nn.Module, list[Any]] = {module: [] for module in modules}
        versions = []
        for call in calls:
            caller = call.caller
            while caller is not None and caller.module not in outputs:
                caller = caller.caller
            if call.module in outputs and caller is None:
                outputs[call.module].append(call.output)
                versions += call.versions
        return cls(outputs, versions)

    def run(self, examples: int, backward: Callable[[int], None]) -> None:
        """Calls a function for each example, which computes its loss and takes the backward pass to its pieces.

        Args:
            examples: number of examples in the batch.
            backward: function of an example's number.

        Raises:
            NotCovered: the modules are not called as they were for the batch, or their outputs are written to.
        """
        for example in range(examples):
            with self._answering(example, examples) as pieces:
                backward(example)
            for whole, piece, first in pieces:
                if piece.grad is not None:
                    _, grads = self._gradients.setdefault(id(whole), (whole, torch.zeros_like(whole)))
                    grads[first : first + len(piece)] = piece.grad
        if any(tensor._version != version for tensor, version in self._versions):
            raise NotCovered("the output of a module is written to in place")

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the outputs that the losses depend on, and their gradients."""
        return [whole for whole, _ in self._gradients.values()], [grad for _, grad in self._gradients.values()]

    @contextlib.contextmanager
    def _answering(self, example: int, examples: int) -> Iterator[list[tuple[Tensor, Tensor, int]]]:
        """Lets the modules return the pieces of an example; yields a list of (output, piece, where it begins)."""
        pieces: list[tuple[Tensor, Tensor, int]] = []

        def piece_of(whole: Tensor) -> Tensor:
            width = len(whole) // examples
            piece = whole.detach()[example * width : (example + 1) * width]
            if whole.requires_grad:
                pieces.append((whole, piece.requires_grad_(), example * width))
            return piece

        def answer_of(module: nn.Module) -> Callable[..., Any]:
            left = iter(self._outputs[module])

            def answer(*_: Any, **__: Any) -> Any:
                for output in left:
                    return map_tensors(output, piece_of)
                raise NotCovered("a module is called more often for an example than for the batch")

            return answer

        before = {module: vars(module).get("forward") for module in self._outputs}
        try:
            for module in self._outputs:  # not by setattr, which compiled and scripted modules have changed
                vars(module)["forward"] = answer_of(module)
            yield pieces
        finally:
            for module, forward in before.items():
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward
