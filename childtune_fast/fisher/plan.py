"""How the gradients of single examples are found in the graph of a batch, made from the graphs of two small batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .graph import LARGE, SMALL, Graph, NotCovered, Use
from .rules import has_rule, is_simple


class Group(NamedTuple):
    """Parameters whose gradients are added up over the same uses, and those uses."""

    names: tuple[str, ...]
    uses: tuple[Use, ...]


class Plan(NamedTuple):
    """How the gradients of single examples are found in graphs of one signature.

    Attributes:
        groups: every use, and the parameters that it belongs to.
        leaves: {index of a node: name of the parameter that it stands for}.
        ends: nodes whose outputs' gradients autograd must compute so that it comes through every use.
        called: names of the parameters whose gradients autograd must compute, since a node that only they need is
            called: one without a rule, or one that computes a shared value. Within a backward pass, autograd's nodes
            compute nothing but what it needs.
        retained: whether such a node may be called after autograd has come through it.
    """

    groups: tuple[Group, ...]
    leaves: dict[int, str]
    ends: tuple[int, ...]
    called: tuple[str, ...]
    retained: bool


def plan_of(small: Graph, large: Graph, names: Mapping[Any, str]) -> Plan:
    """Returns the plan for graphs of one signature.

    Args:
        small: graph of SMALL examples.
        large: graph of LARGE examples; they are the same otherwise.
        names: {parameter: name} of those whose gradients are wanted.

    Raises:
        NotCovered: the examples do not lie in one dimension where a parameter is used.
    """
    leaves = {i: names[p] for i, node in enumerate(large.nodes) if (p := getattr(node, "variable", None)) in names}
    below = _shared_values(small, large, leaves)
    uses = []
    for node, inputs in enumerate(large.inputs):
        for position, source in enumerate(inputs):
            if node not in below and source is not None and below.get(source[0]):
                uses.append(_use(small, large, node, position, source, min(below[source[0]])))
    groups = _groups(uses, below)
    called = {
        name
        for use in uses
        if not (
            has_rule(large.nodes[use.node], use.position)
            and hasattr(large.nodes[straight_to(large, use.source[0])[0]], "variable")
        )
        for name in below[use.source[0]]
    }
    passed = {use.node for use in uses if not called.isdisjoint(below[use.source[0]])}
    retained = any(len(group.uses) > 1 and not called.isdisjoint(group.names) for group in groups)
    return Plan(groups, leaves, _ends(large, uses, passed), tuple(sorted(called)), retained)


def _shared_values(small: Graph, large: Graph, leaves: dict[int, str]) -> dict[int, frozenset[str]]:
    """Returns {index of a node with a shared value: names of the wanted parameters that it is computed from}."""
    below: dict[int, frozenset[str]] = {}
    for node, inputs in enumerate(large.inputs):
        sources = [source[0] for source in inputs if source is not None]
        if small.shapes(node) == large.shapes(node) and all(source in below for source in sources):
            own = frozenset([leaves[node]] if node in leaves else ())
            below[node] = own.union(*(below[source] for source in sources))
    return below


def _use(small: Graph, large: Graph, node: int, position: int, source: tuple[int, int], name: str) -> Use:
    axes = _axes_of_examples(small, large, node)
    if len(axes) != 1:
        raise NotCovered(
            f"'{name}' meets the examples in {large.nodes[node].name()}, with an output of shape "
            f"{large.shapes(node)[0]} for {LARGE} examples, in which they do not lie side by side"
        )
    ((axis, width),) = axes
    shown_by = None
    if width > 1:
        for consumer in (i for i, inputs in enumerate(large.inputs) if (node, 0) in inputs):
            shown = _axes_of_examples(small, large, consumer)
            if "View" in large.nodes[consumer].name() and len(shown) == 1 and shown[0][1] == 1:
                shown_by = consumer, shown[0][0]
    return Use(node, position, source, axis, shown_by)


def _axes_of_examples(small: Graph, large: Graph, node: int) -> list[tuple[int, int]]:
    """Returns the dimensions of a node's output that grow with the batch, and how wide an example is in each."""
    few, many = small.shapes(node)[0], large.shapes(node)[0]
    if len(few) != len(many):
        return []
    return [
        (axis, of_many // LARGE if of_few * LARGE == of_many * SMALL else 0)
        for axis, (of_few, of_many) in enumerate(zip(few, many, strict=True))
        if of_few != of_many
    ]


def _groups(uses: list[Use], below: dict[int, frozenset[str]]) -> tuple[Group, ...]:
    """Puts the uses together that have a parameter in common."""
    groups: list[tuple[set[str], list[Use]]] = []
    for use in uses:
        names, together = set(below[use.source[0]]), [use]
        apart = []
        for group in groups:
            if names.isdisjoint(group[0]):
                apart.append(group)
            else:
                names |= group[0]
                together = group[1] + together
        groups = [*apart, (names, together)]
    return tuple(Group(tuple(sorted(names)), tuple(together)) for names, together in groups)


def _ends(graph: Graph, uses: list[Use], passed: set[int]) -> tuple[int, ...]:
    """Returns the nodes of uses that a backward pass does not come through on its way to others, or to `passed`."""
    of_uses = {use.node for use in uses}
    ends = []
    for node, inputs in enumerate(graph.inputs):
        reached = any(source is not None and source[0] in passed for source in inputs)
        if node in of_uses and not reached and node not in passed:
            ends.append(node)
        if node in of_uses or reached:
            passed.add(node)
    return tuple(ends)


def straight_to(graph: Graph, node: int) -> tuple[int, bool]:
    """Returns what a shared value is but a transpose or a copy of: a node, and whether it is its transpose."""
    transposed = False
    while is_simple(graph.nodes[node]):
        transposed ^= graph.nodes[node].name().startswith("TBackward")
        ((node, _),) = (source for source in graph.inputs[node] if source is not None)
    return node, transposed
