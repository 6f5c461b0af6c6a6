"""One backward pass of a batch that gives the gradients of its examples."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .graph import Graph, Layout, Use
from .plan import Group, Plan, straight_to
from .rules import (
    Gradient,
    OfExamples,
    Place,
    Rows,
    Scratch,
    called,
    dense,
    fitted,
    has_rule,
    keeps_inputs,
    of_examples,
)

Sink = Callable[[str, int, Gradient], None]  # takes the gradient of a parameter for an example

_AT_ONCE = {"cpu": 2**18}  # bytes of a parameter's gradients that are computed at once: few, to stay in the caches
_AT_ONCE_ON_GPU = 64 * 2**20


class SplitPass:
    """One backward pass of a batch that hands on the gradients of its examples.

    Args:
        graph: the graph of the batch.
        plan: the plan of such graphs.
        examples: number of examples in the batch.

    Raises:
        NotCovered: the batch does not fit the plan.
    """

    def __init__(self, graph: Graph, plan: Plan, examples: int) -> None:
        self._graph = graph
        self._plan = plan
        self._examples = examples
        self._layouts = {use: Layout.of(use, graph, examples) for group in plan.groups for use in group.uses}
        self._waiting: dict[Group, list[tuple[tuple[int, int], OfExamples]]] = defaultdict(list)
        self._scratch = Scratch()
        self._left = {group: len(group.uses) for group in plan.groups}

    def held(self) -> int:
        """Returns how many bytes wait during the pass, since a parameter has several uses, or one without a rule."""
        waiting, most_at_once = 0, 0
        for group in self._plan.groups:
            sizes = [self._held_by(use) for use in group.uses]
            if len(sizes) > 1:
                waiting += sum(sizes)
            elif not has_rule(self._graph.nodes[group.uses[0].node], group.uses[0].position):
                most_at_once = max(most_at_once, *sizes)
        return waiting + most_at_once

    def _held_by(self, use: Use) -> int:
        if keeps_inputs(self._graph.nodes[use.node], use.position):
            return 2 * _bytes(self._graph.outputs(use.node)[0])  # what has come in, and what has gone out
        return self._examples * _bytes(self._graph.outputs(use.source[0])[use.source[1]])

    def run(self, roots: list[Tensor], grads: list[Tensor], params: Mapping[str, Tensor], sink: Sink) -> None:
        """Takes the backward pass; no parameter's `grad` changes.

        Args:
            roots: outputs of the forward pass.
            grads: their gradients.
            params: {name: parameter} of those in the plan.
            sink: function that takes each gradient: of (parameter name, number of the example, gradient).
        """
        self._sink = sink
        of_node = defaultdict(list)
        for group in self._plan.groups:
            for use in group.uses:
                of_node[use.node].append((group, use))
        nodes, ends = self._graph.nodes, self._plan.ends
        handles = [
            nodes[node].register_prehook(partial(self._arrive, uses))
            for node, uses in of_node.items()
            if node not in ends
        ]
        wanted: list[Any] = [
            *(GradientEdge(nodes[end], 0) for end in ends),
            *(params[name] for name in self._plan.called),
        ]
        try:
            found = torch.autograd.grad(roots, wanted, grads, retain_graph=self._plan.retained, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for end, grad in zip(ends, found[: len(ends)], strict=True):
            self._arrive(of_node[end], (grad,))
        if any(self._left.values()):
            raise RuntimeError("estimate_fisher: the backward pass did not come through every use of the parameters")

    @torch.no_grad()
    def _arrive(self, uses: list[tuple[Group, Use]], grads: tuple[Tensor | None, ...]) -> None:
        for group, use in uses:
            if grads[0] is not None:
                self._waiting[group].append((use.source, of_examples(self._place(use, group), grads[0])))
            self._left[group] -= 1
            if not self._left[group]:
                self._finish(self._waiting.pop(group, []))

    def _place(self, use: Use, group: Group) -> Place:
        transposed = self._graph.nodes[use.source[0]].name().startswith("TBackward")
        value = self._graph.outputs(use.source[0])[use.source[1]]
        product = self._scratch.product if len(group.uses) == 1 else torch.bmm  # others are added up
        return Place(self._graph.nodes[use.node], use.position, self._layouts[use], value, transposed, product)

    def _finish(self, parts: list[tuple[tuple[int, int], OfExamples]]) -> None:
        """Hands on the gradients of parameters whose uses have all been reached."""
        if not parts:
            return
        largest = max(math.prod(self._graph.shapes(source[0])[source[1]]) for source, _ in parts)
        device = self._graph.outputs(parts[0][0][0])[0].device
        straight = self._straight({source for source, _ in parts})
        step = max(1, _AT_ONCE.get(device.type, _AT_ONCE_ON_GPU) // (4 * max(largest, 1)))
        for begin in range(0, self._examples, step):
            end = min(begin + step, self._examples)
            computed = [(source, of(begin, end)) for source, of in parts]
            for i in range(end - begin):
                of_one: dict[tuple[int, int], Gradient] = {}
                for source, gradients in computed:
                    of_one[source] = _sum(of_one[source], gradients[i]) if source in of_one else gradients[i]
                for name, grad in (straight(of_one) if straight else self._of_parameters(of_one)).items():
                    self._sink(name, begin + i, grad)

    def _straight(self, sources: set[tuple[int, int]]) -> Callable[[dict[Any, Gradient]], dict[str, Gradient]] | None:
        """Returns what `_of_parameters` does for a parameter that is only transposed or copied; None for any other."""
        node, transposed = straight_to(self._graph, min(sources)[0])
        if len(sources) > 1 or node not in self._plan.leaves:
            return None
        name, of = self._plan.leaves[node], self._graph.outputs(node)[0]

        def only(grads: dict[Any, Gradient]) -> dict[str, Gradient]:
            (grad,) = grads.values()
            if isinstance(grad, Rows) and not transposed:
                return {name: grad}
            return {name: fitted(dense(grad).t() if transposed else dense(grad), of)}

        return only

    def _of_parameters(self, grads: dict[tuple[int, int], Gradient]) -> dict[str, Gradient]:
        """Returns the gradients of the parameters that shared values are computed from, given the values' gradients."""
        found: dict[str, Gradient] = {}
        while grads:
            index = max(grads)[0]  # no node before it has this one as an input
            outputs = self._graph.shapes(index)
            of_outputs = [grads.pop((index, output), None) for output in range(len(outputs))]
            if hasattr(self._graph.nodes[index], "variable"):
                if index in self._plan.leaves:
                    found[self._plan.leaves[index]] = of_outputs[0]  # type: ignore[assignment]
                continue
            whole = [None if grad is None else dense(grad) for grad in of_outputs]
            for source, grad in zip(self._graph.inputs[index], called(self._graph.nodes[index], whole), strict=True):
                if source is not None and grad is not None:
                    grad = fitted(grad, self._graph.outputs(source[0])[source[1]])
                    grads[source] = _sum(grads[source], grad) if source in grads else grad
        return found


def _bytes(of: Any) -> int:
    """Returns how large a tensor is of which autograd knows the shape and the dtype."""
    size: int = math.prod(of.shape) * of.dtype.itemsize
    return size


def _sum(first: Gradient, second: Gradient) -> Gradient:
    if isinstance(first, Rows) and isinstance(second, Rows):
        indices, inverse = torch.unique(torch.cat([first.indices, second.indices]), return_inverse=True)
        values = first.values.new_zeros(len(indices), first.values.shape[1])
        return Rows(indices, values.index_add_(0, inverse, torch.cat([first.values, second.values])), first.shape)
    return dense(first) + dense(second)
