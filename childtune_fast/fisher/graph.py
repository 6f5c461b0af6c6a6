"""The graph that autograd records of a forward pass, and where in it the parameters meet the examples of a batch.

A value that is computed from parameters alone, such as a transposed weight, is the same for all examples: it is shared.
Where an operation combines a shared value with values of the examples, the gradient of its output has a part for each
example, and with it the gradient of the shared value. In which dimension of the output the examples lie is read off two
graphs, of two batches that differ in their number of examples only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

SMALL, LARGE = 2, 3  # numbers of examples in the two batches whose graphs are compared

# What is recorded under a TorchDispatchMode, such as the one that watches the weights in the first batch, for the same.
_ALIASES = {"ReshapeAliasBackward0": "ViewBackward0"}


class NotCovered(Exception):
    """The gradients of single examples cannot be told apart in a batch's backward pass; the text says why."""


class Graph:
    """The nodes between some outputs of a forward pass and the tensors that it began with.

    Attributes:
        nodes: every node once, after those whose outputs are its inputs.
        inputs: for each node a list of (index of a node, number of its output), or None for an input without gradient.
    """

    def __init__(self, roots: Sequence[Node]) -> None:
        index: dict[Node, int] = {}
        self.nodes: list[Node] = []
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            node, inputs_done = stack.pop()
            if node in index:
                continue
            if inputs_done:
                index[node] = len(self.nodes)
                self.nodes.append(node)
                continue
            stack.append((node, True))
            stack.extend((source, False) for source, _ in reversed(node.next_functions) if source is not None)
        self.inputs = [
            [None if source is None else (index[source], output) for source, output in node.next_functions]
            for node in self.nodes
        ]

    def signature(self, names: Mapping[Any, str]) -> tuple[Any, ...]:
        """Returns what two graphs share that differ in the sizes of their tensors only; `names` are those of leaves.

        Which sizes are 1 is part of it, since in what order two dimensions lie does not matter if one of them is 1.
        """
        return tuple(
            (
                _ALIASES.get(node.name(), node.name()),
                names.get(getattr(node, "variable", None)),
                tuple(inputs),
                tuple(tuple(size == 1 for size in shape) for shape in self.shapes(index)),
            )
            for index, (node, inputs) in enumerate(zip(self.nodes, self.inputs, strict=True))
        )

    def outputs(self, node: int) -> Sequence[Any]:
        """Returns what autograd knows of the outputs that a node has had: for each its shape, dtype and device."""
        of_torch: Any = self.nodes[node]
        outputs: Sequence[Any] = of_torch._input_metadata
        return outputs

    def shapes(self, node: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the outputs that a node has had in the forward pass."""
        return [tuple(output.shape) for output in self.outputs(node)]


class Use(NamedTuple):
    """One place where a shared value meets values of the examples.

    Attributes:
        node: index of the node that combines them.
        position: which of the node's inputs is the shared value.
        source: the shared value: the index of a node, and the number of its output.
        axis: the dimension of the node's output that the examples lie in, perhaps beside others.
        shown_by: a node that shows the examples in a dimension of their own: its index, and the dimension; or None.
    """

    node: int
    position: int
    source: tuple[int, int]
    axis: int
    shown_by: tuple[int, int] | None


class Layout(NamedTuple):
    """Where the examples of a batch lie in one dimension of a tensor: it has `before * examples * after` places."""

    axis: int
    before: int
    examples: int
    after: int

    @classmethod
    def of(cls, use: Use, graph: Graph, examples: int) -> "Layout":
        """Returns the layout of a use's output, in the graph of a batch.

        Raises:
            NotCovered: the sizes do not fit the number of examples.
        """
        size = graph.shapes(use.node)[0][use.axis]
        before = 1
        if use.shown_by is not None:
            shape = graph.shapes(use.node)[0], graph.shapes(use.shown_by[0])[0]
            before = math.prod(shape[1][: use.shown_by[1]]) // math.prod(shape[0][: use.axis])
        if before == 0 or size % (before * examples):
            raise NotCovered(f"{graph.nodes[use.node].name()} has an output with {size} places for {examples} examples")
        return cls(use.axis, before, examples, size // (before * examples))

    def first(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of shape [examples, before * after, dimensions beside the axis]."""
        parts = tensor.movedim(self.axis, 0).unflatten(0, (self.before, self.examples, self.after))
        return parts.movedim(1, 0).flatten(1, 2)
