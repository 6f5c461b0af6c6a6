"""The gradient of a parameter for each example, from what one operation has saved and the gradient of its output.

Each rule serves one operation, in which a value that all examples share meets values of the examples. Operations
without a rule of their own compute their whole gradient for each example, with the gradients of the others set to 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Layout, NotCovered


class Rows(NamedTuple):
    """The gradient of a table of which an example has used some rows only.

    Attributes:
        indices: the rows, int64 of shape [k], each once.
        values: their gradients, of shape [k, columns].
        shape: shape of the table.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """Returns the gradient of the whole table."""
        return self.values.new_zeros(self.shape).index_add_(0, self.indices, self.values)


Gradient = Tensor | Rows


def dense(grad: Gradient) -> Tensor:
    """Returns a gradient as one tensor."""
    return grad.dense() if isinstance(grad, Rows) else grad


OfExamples = Callable[[int, int], Sequence[Gradient]]  # (begin, end) -> the gradients of these examples


class Scratch:
    """Memory for products of matrices, used again and again: allocating it anew takes as long as some products."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Returns the product of two batches of matrices; it is valid until the next call."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        size, memory = math.prod(shape), self._memory
        if memory is None or len(memory) < size or (memory.dtype, memory.device) != (left.dtype, left.device):
            memory = self._memory = torch.empty(size, dtype=left.dtype, device=left.device)
        return torch.bmm(left, right, out=memory[:size].view(shape))


class Place(NamedTuple):
    """Where a shared value is used, in one batch.

    Attributes:
        node: the operation.
        position: which of its inputs is the shared value.
        layout: where the examples lie in its output.
        value: what autograd knows of the shared value: its shape, dtype and device.
        transposed: whether the shared value is a matrix's transpose, which is then what must be contiguous.
        product: computes products of matrices; what it returns need not last longer than until it is called again.
    """

    node: Any  # a torch.autograd.graph.Node, whose saved tensors are attributes
    position: int
    layout: Layout
    value: Any
    transposed: bool
    product: Callable[[Tensor, Tensor], Tensor]


def of_examples(place: Place, grad: Tensor) -> OfExamples:
    """Returns a function that computes the gradients of the shared value for some of the examples.

    The function may be called after the operation has dropped what it has saved.

    Args:
        place: where the shared value is used.
        grad: gradient of the operation's output.
    """
    rule = _RULES.get((_kind(place.node), place.position), _one_at_a_time)
    return rule(place, grad)


def has_rule(node: Node, position: int) -> bool:
    """Returns whether there is a rule for an operation with a shared value as its input of this number."""
    return (_kind(node), position) in _RULES


def keeps_inputs(node: Node, position: int) -> bool:
    """Returns whether a rule computes its gradients late, and until then keeps what it computes them from."""
    return _RULES.get((_kind(node), position)) in (_matrix_product, _embedding, _convolution)


def is_simple(node: Node) -> bool:
    """Returns whether a node only transposes or copies its input, so that `called` need not call it."""
    return _kind(node) in ("TBackward", "ToCopyBackward")


def _kind(node: Node) -> str:
    return node.name().rstrip("0123456789")


def _reduced(place: Place, product: Tensor) -> OfExamples:
    """Adds up the elements of an example that the shared value was broadcast to.

    Args:
        place: where the shared value is used.
        product: for each element of the output what it adds to the gradient of the shared value.
    """
    axis, rank = place.layout.axis, product.ndim
    shape = tuple(place.value.shape)
    broadcast = (1,) * (rank - len(shape)) + shape
    parts = place.layout.first(product)  # [examples, places of an example, other dimensions]
    others = [size for dim, size in enumerate(broadcast) if dim != axis]
    sums = parts.sum([1, *(dim + 2 for dim, size in enumerate(others) if size == 1)], keepdim=True)
    shaped = sums.reshape(-1, *shape).to(place.value.dtype)
    return lambda begin, end: shaped[begin:end].unbind()


def _added(place: Place, grad: Tensor) -> OfExamples:
    return _reduced(place, grad)


def _added_times_alpha(place: Place, grad: Tensor) -> OfExamples:
    return _reduced(place, grad * place.node._saved_alpha)


def _subtracted(place: Place, grad: Tensor) -> OfExamples:
    return _reduced(place, grad * -place.node._saved_alpha)


def _multiplied(place: Place, grad: Tensor) -> OfExamples:
    other = place.node._saved_self if place.position == 1 else place.node._saved_other
    return _reduced(place, grad * other)


def _bias_of_product(place: Place, grad: Tensor) -> OfExamples:
    return _reduced(place, grad * place.node._saved_beta if place.node._saved_beta != 1 else grad)


def _matrix_product(place: Place, grad: Tensor) -> OfExamples:
    """A product of the examples' rows with a shared matrix, or with a shared batch of matrices."""
    node = place.node
    rows = node._saved_mat1 if node.name().startswith("Addmm") else node._saved_self
    alpha = getattr(node, "_saved_alpha", 1)
    left, right = place.layout.first(rows), place.layout.first(grad if alpha == 1 else grad * alpha)
    if grad.ndim == 3:  # [examples, places, batch, columns], with the batch in front of the rows
        return _batched_product(place, left, right)
    if place.transposed:
        return lambda begin, end: place.product(right[begin:end].mT, left[begin:end]).mT.unbind()
    return lambda begin, end: place.product(left[begin:end].mT, right[begin:end]).unbind()


def _batched_product(place: Place, left: Tensor, right: Tensor) -> OfExamples:
    if place.layout.axis != 1:
        raise NotCovered(f"{place.node.name()} has the examples in dimension {place.layout.axis}")
    return lambda begin, end: torch.einsum("epbi,epbo->ebio", left[begin:end], right[begin:end]).unbind()


def _embedding(place: Place, grad: Tensor) -> OfExamples:
    """Rows of a table, looked up by the examples' indices."""
    node, layout = place.node, place.layout
    if node._saved_scale_grad_by_freq:
        raise NotCovered("an embedding scales gradients by the frequencies of indices in the batch")
    indices = layout.first(node._saved_indices).flatten(1)
    values = layout.first(grad).reshape(*indices.shape, -1)
    padding = node._saved_padding_idx

    def rows(example: int) -> Rows:
        used, inverse = torch.unique(indices[example], return_inverse=True)
        sums = values.new_zeros(len(used), values.shape[-1]).index_put_((inverse,), values[example], accumulate=True)
        return Rows(used, sums.masked_fill_((used == padding).unsqueeze(1), 0), tuple(place.value.shape))

    return lambda begin, end: [rows(example) for example in range(begin, end)]


def _layer_norm_weight(place: Place, grad: Tensor) -> OfExamples:
    node = place.node
    normalized = (node._saved_input.to(node._saved_result1.dtype) - node._saved_result1) * node._saved_result2
    return _reduced(place, grad.to(normalized.dtype) * normalized)


def _convolution(place: Place, grad: Tensor) -> OfExamples:
    """A convolution, of whose weight or bias torch computes the gradient from an example's part of the batch."""
    node, layout = place.node, place.layout
    if layout.axis != 0:
        raise NotCovered(f"{node.name()} has the examples in dimension {layout.axis}")
    inputs, grads = layout.first(node._saved_input), layout.first(grad)
    weight = node._saved_weight
    bias_shape = list(node._saved_bias_sym_sizes_opt or [grad.shape[1]])
    options = node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed
    more = node._saved_output_padding, node._saved_groups, [False, place.position == 1, place.position == 2]

    def of_one(example: int) -> Tensor:
        one = grads[example], inputs[example]
        return torch.ops.aten.convolution_backward(*one, weight, bias_shape, *options, *more)[place.position]

    return lambda begin, end: [of_one(example) for example in range(begin, end)]


def _one_at_a_time(place: Place, grad: Tensor) -> OfExamples:
    """Any operation: its whole gradient, with the gradients of all other examples set to 0."""
    axis, before, examples, after = place.layout
    index = torch.arange(before * examples * after, device=grad.device).view(before, examples, after)
    others = [None] * (len(place.node._input_metadata) - 1)  # gradients of outputs that are not used
    found = []
    for example in range(examples):
        of_example = index[:, example].flatten()
        alone = torch.zeros_like(grad).index_copy_(axis, of_example, grad.index_select(axis, of_example))
        found.append(fitted(called(place.node, [alone, *others])[place.position], place.value))
    return lambda begin, end: found[begin:end]


def called(node: Node, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Returns the gradients of a node's inputs, for given gradients of its outputs, before they are `fitted`."""
    if is_simple(node):
        return [None if grads[0] is None else grads[0].t() if _kind(node) == "TBackward" else grads[0]]
    inputs = node(*grads)  # type: ignore[operator]
    return inputs if isinstance(inputs, tuple) else (inputs,)


def fitted(grad: Tensor | None, of: Any) -> Tensor:
    """Returns a gradient in the shape, dtype and device of what it belongs to, as autograd does; zeros for None.

    Args:
        grad: the gradient that a node has returned.
        of: what autograd knows of the input: its shape, dtype and device.
    """
    if grad is None:
        return torch.zeros(of.shape, dtype=of.dtype, device=of.device)
    return (grad if grad.shape == of.shape else grad.sum_to_size(of.shape)).to(of.device, of.dtype)


_RULES: dict[tuple[str, int], Callable[[Place, Tensor], OfExamples]] = {
    ("AddBackward", 0): _added,
    ("AddBackward", 1): _added_times_alpha,
    ("SubBackward", 0): _added,
    ("SubBackward", 1): _subtracted,
    ("ExpandBackward", 0): _added,
    ("MulBackward", 0): _multiplied,
    ("MulBackward", 1): _multiplied,
    ("AddmmBackward", 0): _bias_of_product,
    ("AddmmBackward", 2): _matrix_product,
    ("MmBackward", 1): _matrix_product,
    ("BmmBackward", 1): _matrix_product,
    ("EmbeddingBackward", 0): _embedding,
    ("NativeLayerNormBackward", 1): _layer_norm_weight,
    ("NativeLayerNormBackward", 2): _added,
    ("ConvolutionBackward", 1): _convolution,
    ("ConvolutionBackward", 2): _convolution,
}
