"""The gradients of all examples of a batch, from one forward and one backward pass of the batch.

In a batch's backward pass, the gradient of an operation's output has a part for each example, and with what the
operation has saved it gives the parameter's gradient for each example (`rules.py`). They are computed one after the
other, and handed on before the next one. The gradients of the batch, which are their sums, are not computed at all.

Whether that is right for a model and a loss function cannot be told in advance. So it is tried: on a few examples, each
gradient must be that of a pass with this example alone.
"""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .backward import Backward
from .graph import LARGE, SMALL, Graph, NotCovered
from .plan import Plan, plan_of
from .replay import Replay, calls_of, separable
from .rules import Gradient
from .sketch import Sketches
from .split import Sink, SplitPass
from .together import NotFiniteError
from .watch import Constants

LossOf = Callable[[int, int], Tensor]  # (begin, end) -> the loss of these examples of a batch

_MOST_HELD = 256 * 2**20  # bytes that wait for the last use of a parameter, or for the end of the forward pass
_MOST_PLANS = 8  # of a model whose graphs differ from batch to batch


class _Forward(NamedTuple):
    """Examples whose forward pass is done, and their losses' backward passes, down to the separable modules.

    Attributes:
        examples: their number.
        graph: the graph below the separable modules' outputs.
        signature: the graph's.
        roots: the outputs that the losses depend on, and `grads` their gradients.
        above: (parameter name, example, gradient) of the parameters that are used outside of the separable modules.
    """

    examples: int
    graph: Graph
    signature: tuple[Any, ...]
    roots: list[Tensor]
    grads: list[Tensor]
    above: list[tuple[str, int, Tensor]]


class Part(NamedTuple):
    """Some examples of a batch whose forward pass is done: the number of the first one, and how many they are."""

    begin: int
    examples: int
    forward: _Forward
    backward: SplitPass


class ByExample:
    """Computes the gradients of all examples of a batch at once, for models and losses for which that is right.

    Args:
        model: module that the loss is computed with.
        params: {name: parameter of the model}, those whose gradients are wanted.
        backward: takes the backward pass of a loss, and hands on the gradients of `params`.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Parameter], backward: Backward) -> None:
        self._model = model
        self._params = params
        self._names = {param: name for name, param in params.items()}
        self._backward = backward
        self._modules: list[nn.Module] = []
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def part(self, begin: int, end: int, loss: LossOf) -> Part | None:
        """Takes the forward pass of the first examples of a batch, from `begin` on: as many as there is memory for.

        Args:
            begin: number of the first example.
            end: that of the last one, plus 1; at least LARGE more, as long as nothing has been tried.
            loss: function that returns the loss of the examples from one number to another.

        Returns:
            What `finish` takes; None if two examples need too much memory, or if the first ones do not tell whether it
            is right, since their gradients are the same.

        Raises:
            NotCovered: it is not right for this model and loss, or this batch.
            NotFiniteError: a loss is not finite.
        """
        if not self._plans and not self._try(begin, loss):
            return None
        with _not_covered():
            while end - begin > 1:
                done = self._forward(begin, end, loss)
                new = done.signature not in self._plans and end - begin >= LARGE and len(self._plans) < _MOST_PLANS
                if new and not self._try(begin, loss):
                    return None
                if done.signature not in self._plans:
                    raise NotCovered("the model computes differently from batch to batch")
                backward = self._pass(done, self._plans[done.signature])
                if backward.held() <= _MOST_HELD:
                    return Part(begin, end - begin, done, backward)
                del done, backward
                end = (begin + end) // 2
        return None

    def finish(self, part: Part, sink: Sink) -> None:
        """Takes the backward pass of a part, and calls a function with the gradient of each parameter for each example.

        Args:
            part: what `part` has returned.
            sink: function of (parameter name, number of the example, gradient).

        Raises:
            NotCovered: an error, before the first gradient.
        """
        begun = False

        def numbered(name: str, example: int, grad: Gradient) -> None:
            nonlocal begun
            begun = True
            sink(name, part.begin + example, grad)

        try:
            self._finish(part.forward, part.backward, numbered)
        except Exception as error:
            if begun:
                raise
            raise _as_not_covered(error) from error

    def _forward(self, begin: int, end: int, loss: LossOf) -> _Forward:
        with calls_of(self._model, self._modules) as calls:
            loss(begin, end)
        return self._above(begin, end, loss, Replay.of(self._modules, calls))

    def _above(self, begin: int, end: int, loss: LossOf, replay: Replay) -> _Forward:
        """Takes the losses and their backward passes outside of the separable modules."""
        above: list[tuple[str, int, Tensor]] = []

        def backward(example: int) -> None:
            of_one = loss(begin + example, begin + example + 1)
            self._backward(of_one, lambda name, grad: above.append((name, example, grad)))
            if sum(grad.nbytes for _, _, grad in above) > _MOST_HELD:
                raise NotCovered("large parameters are used outside of the modules")

        replay.run(end - begin, backward)
        roots, grads = replay.roots()
        graph = Graph([root.grad_fn for root in roots if root.grad_fn is not None])
        return _Forward(end - begin, graph, graph.signature(self._names), roots, grads, above)

    def _pass(self, done: _Forward, plan: Plan) -> SplitPass:
        twice = {name for name, _, _ in done.above} & {name for group in plan.groups for name in group.names}
        if twice:
            raise NotCovered(f"'{min(twice)}' is used inside and outside of the modules")
        return SplitPass(done.graph, plan, done.examples)

    def _finish(self, done: _Forward, backward: SplitPass, sink: Sink) -> None:
        backward.run(done.roots, done.grads, self._params, sink)
        for name, example, grad in done.above:
            sink(name, example, grad)

    # ---- The trial ---------------------------------------------------------------------------------------------------

    def _try(self, begin: int, loss_of: LossOf) -> bool:
        """Makes a plan for the graphs of a model, from the first examples from `begin` on, and proves it by them.

        Returns:
            Whether it is proven. It is not by examples that all have the same gradients.

        Raises:
            NotCovered: a gradient of one of the examples differs from that of a pass with this example alone.
        """

        def loss(first: int, last: int) -> Tensor:
            return loss_of(begin + first, begin + last)

        with torch.random.fork_rng(self._gpus()):
            before = self._random_states()
            alone = self._alone(loss)  # first, since what it raises would be raised without a plan, too
            draws = before != self._random_states()
            with _not_covered(), Constants() if draws else contextlib.nullcontext():
                alone = self._alone(loss) if draws else alone
                if not alone.tell_apart():
                    return False
                plan, done = self._plan(loss)
                together = Sketches()
                self._finish(done, self._pass(done, plan), together.add)
        different = together.different(alone)
        if different is not None:
            raise NotCovered(f"the gradients of '{different}' are not those of the examples alone")
        self._plans[done.signature] = plan
        return True

    def _alone(self, loss: LossOf) -> Sketches:
        """Returns the gradients of the first examples, each by a pass of its own."""
        alone = Sketches()
        for example in range(LARGE):

            def add(name: str, grad: Tensor, example: int = example) -> None:
                alone.add(name, example, grad)

            self._backward(loss(example, example + 1), add)
        return alone

    def _plan(self, loss: LossOf) -> tuple[Plan, _Forward]:
        with calls_of(self._model) as few:
            loss(0, SMALL)
        with calls_of(self._model) as many:
            loss(0, LARGE)
        self._modules = separable(few, many)
        small = self._above(0, SMALL, loss, Replay.of(self._modules, few))
        large = self._above(0, LARGE, loss, Replay.of(self._modules, many))
        if small.signature != large.signature:
            raise NotCovered("the model computes differently for another number of examples")
        return plan_of(small.graph, large.graph, self._names), large

    def _gpus(self) -> list[int]:
        return sorted({param.get_device() for param in self._params.values() if param.device.type == "cuda"})

    def _random_states(self) -> list[list[int]]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus())]
        return [state.tolist() for state in states]


@contextlib.contextmanager
def _not_covered() -> Iterator[None]:
    """Turns errors into NotCovered: a model may raise anything when its modules do not compute."""
    try:
        yield
    except Exception as error:
        raise _as_not_covered(error) from error


def _as_not_covered(error: Exception) -> Exception:
    if isinstance(error, (NotCovered, NotFiniteError)):
        return error
    return NotCovered(f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}")
