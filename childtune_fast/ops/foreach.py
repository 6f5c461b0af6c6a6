"""Step and norm in torch for many tensors at once, on any device, with the bits of reference.py, which specifies both.

Where there are no kernels, an operation costs more than its arithmetic: it is dispatched, and on a GPU launched. So a
step works on chunks: the values of as many parameters as fit are copied into one buffer, on which each line is one
operation, and `torch._foreach_*` updates their averages in place. A chunk's size bounds the memory that a step takes.

The order of operations is the reference's, and each rounds once. Nothing is divided by a Python number: on CUDA, torch
multiplies by the reciprocal, in `torch._foreach_div_` too where the tensors' dtypes or strides differ.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .packed_mask import packed_size, unpack
from .random_mask import BLOCK, KEEP_ALL, Blocks, kept_elements
from .state_values import is_rounded
from .step_group import StepGroup, compute_dtype

if TYPE_CHECKING:
    import numpy.typing as npt

_CHUNK_BYTES = 1 << 24  # of one buffer; a chunk has two, or before them what the masks take, 7 / 4 of one


def step(groups: list[StepGroup]) -> None:
    """Takes one step for every parameter of every group, in place, as `reference.step` does."""
    for group in groups:
        if group.child_bits or is_rounded(group):
            reference.step([group])
            continue
        of_one_kind: defaultdict[tuple[torch.device, torch.dtype, int], list[int]] = defaultdict(list)
        uncuttable: list[int] = []
        for i, count in enumerate(_counts(group.steps)):
            if _is_whole_or_cuttable(group, i):
                of_one_kind[group.exp_avgs[i].device, group.params[i].dtype, count].append(i)
            else:
                uncuttable.append(i)
        for (_, _, count), entries in of_one_kind.items():
            for chunk in _chunks(group, entries):
                _step_chunk(group, chunk, count + 1)
            torch._foreach_add_([group.steps[i] for i in entries], 1)
        if uncuttable:
            reference.step([_part_of(group, uncuttable)])


def _counts(steps: list[Tensor]) -> list[int]:
    """Returns the steps taken so far; waits for each device once."""
    return [int(count) for count in reference.numbers([count.reshape(()) for count in steps])]


def _part_of(group: StepGroup, entries: list[int]) -> StepGroup:
    """Returns a group of some of a group's parameters."""
    lists = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    lists = {name: [x[i] for i in entries] for name, x in lists.items() if isinstance(x, list) and x}
    return dataclasses.replace(group, **lists)


# ---- What is stepped together --------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Elements of a parameter that are consecutive in its logical order, and the blocks of the mask that they lie in.

    Attributes:
        tensors: the piece of parameter, gradient, both averages and, with amsgrad, the maximum: tensors of one shape.
        blocks: the blocks; the first may begin before the piece, and the last may end after it.
        skipped: how many elements of the first block lie before the piece.
    """

    tensors: list[Tensor]
    blocks: Blocks
    skipped: int


def _is_whole_or_cuttable(group: StepGroup, i: int) -> bool:
    """Returns whether a parameter fits into a chunk as it is, or can be cut."""
    fits = group.slices is None and group.exp_avgs[i].numel() <= _room(group.exp_avgs[i]) * BLOCK
    return fits or _is_cuttable(_tensors(group, i))


def _room(exp_avg: Tensor) -> int:
    """Returns how many blocks fit into a chunk."""
    return _CHUNK_BYTES // exp_avg.element_size() // BLOCK


def _tensors(group: StepGroup, i: int) -> list[Tensor]:
    lists = (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, group.max_exp_avg_sqs)
    return [tensors[i] for tensors in (lists if group.amsgrad else lists[:-1])]


def _is_cuttable(tensors: list[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _chunks(group: StepGroup, entries: list[int]) -> Iterator[list[_Piece]]:
    """Cuts parameters of one dtype and device into pieces, and yields as many pieces at a time as fit into a chunk."""
    chunk: list[_Piece] = []
    room = left = _room(group.exp_avgs[entries[0]])
    for i in entries:
        tensors = _tensors(group, i)
        cuttable = _is_cuttable(tensors)
        for start, end, offset in _runs(group, i):
            while start < end:
                first, skipped = divmod(offset, BLOCK)
                blocks = -(-(skipped + end - start) // BLOCK)
                if left == 0 or (blocks > left and not cuttable):
                    yield chunk
                    chunk, left = [], room
                blocks = min(blocks, left)
                length = min(end - start, blocks * BLOCK - skipped)
                pieces = tensors if length == tensors[0].numel() else _cut(tensors, start, length)
                chunk.append(_Piece(pieces, Blocks(first, blocks, group.indices[i]), skipped))
                left, start, offset = left - blocks, start + length, offset + length
    if chunk:
        yield chunk


def _runs(group: StepGroup, i: int) -> Iterator[tuple[int, int, int]]:
    """Yields (start, end, offset): elements [start, end) of a tensor lie from `offset` on in the whole parameter."""
    numel = group.exp_avgs[i].numel()
    offset, run, stride = (0, numel, 0) if group.slices is None else group.slices[i]
    for k in range(numel // max(run, 1)):
        yield k * run, (k + 1) * run, offset + k * stride


def _cut(tensors: list[Tensor], start: int, length: int) -> list[Tensor]:
    return [tensor.view(-1)[start : start + length] for tensor in tensors]


# ---- The update ----------------------------------------------------------------------------------------------------


def _step_chunk(group: StepGroup, chunk: list[_Piece], step: int) -> None:
    """Updates pieces that are at the same step; csrc/core/adamw.h names what it computes."""
    params, grads, exp_avgs, exp_avg_sqs, *maxima = zip(*(piece.tensors for piece in chunk), strict=True)
    c = reference.step_constants(group, step)
    dtype, device = compute_dtype(params[0]), exp_avgs[0].device
    kept = None
    if group.keep_threshold < KEEP_ALL:
        kept = kept_elements([piece.blocks for piece in chunk], group.keep_threshold, group.seed, step, device)
    blocks = sum(piece.blocks.length for piece in chunk)
    grad, temp = torch.empty((2, blocks * BLOCK), dtype=dtype, device=device)
    grad_pieces, temp_pieces = _pieces(grad, chunk), _pieces(temp, chunk)

    torch._foreach_copy_(grad_pieces, grads)
    grad.mul_(c.grad_factor)
    if kept is not None:
        torch.where(kept, grad, grad.new_zeros(()), out=grad)

    torch._foreach_mul_(exp_avgs, group.beta1)
    torch.mul(grad, 1 - group.beta1, out=temp)
    torch._foreach_add_(exp_avgs, temp_pieces)

    torch._foreach_mul_(exp_avg_sqs, group.beta2)
    torch.mul(grad, 1 - group.beta2, out=temp).mul_(grad)
    torch._foreach_add_(exp_avg_sqs, temp_pieces)

    torch._foreach_copy_(temp_pieces, exp_avg_sqs)
    if maxima:
        torch._foreach_copy_(grad_pieces, maxima[0])
        torch.where(temp <= grad, grad, temp, out=temp)
        torch._foreach_copy_(maxima[0], temp_pieces)
    _sqrt_(temp)
    temp.div_(torch.full((), c.bias_correction2_sqrt, dtype=dtype, device=device)).add_(group.eps)

    torch._foreach_copy_(grad_pieces, exp_avgs)
    grad.mul_(c.step_size).div_(temp)
    torch._foreach_copy_(temp_pieces, params)
    temp.mul_(c.decay_before).sub_(grad).mul_(c.decay_after)
    torch._foreach_copy_(params, _pieces(reference.stored(temp, params[0].dtype), chunk))


def _pieces(buffer: Tensor, chunk: list[_Piece]) -> list[Tensor]:
    """Returns the views of a chunk's buffer that belong to its pieces, of their shapes."""
    sizes = []
    for piece in chunk:
        numel = piece.tensors[0].numel()
        sizes += [piece.skipped, numel, piece.blocks.length * BLOCK - piece.skipped - numel]
    views = buffer.split_with_sizes(sizes)[1::3]
    shapes = [piece.tensors[0].shape for piece in chunk]
    return [view if len(shape) == 1 else view.view(shape) for view, shape in zip(views, shapes, strict=True)]


def _sqrt_(x: Tensor) -> None:
    """Takes the correctly rounded square root in place; see `reference._sqrt`. Between pieces lies anything."""
    if not x.is_cpu:
        x.sqrt_()
        return
    values = x.numpy()
    with np.errstate(invalid="ignore"):
        np.sqrt(values, out=values)


# ---- The norm ------------------------------------------------------------------------------------------------------


def sums_of_squares(tensors: Sequence[Tensor], child_bits: Sequence[Tensor | None]) -> list[float]:
    """Returns each tensor's sum of squares; see `reference.sum_of_squares`. Waits for each device once."""
    totals = [0.0] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        entries = [i for i, tensor in enumerate(tensors) if tensor.device == device and tensor.numel() > 0]
        rows = [-(-tensors[i].numel() // reference.NORM_CHUNK) for i in entries]
        sums = [_sums_of_rows(*part) for part in _norm_parts([(tensors[i], child_bits[i]) for i in entries])]
        if sums:
            for i, of_tensor in zip(entries, torch.cat(sums).cpu().split(rows), strict=True):
                padded = np.zeros(1 << (len(of_tensor) - 1).bit_length())
                padded[: len(of_tensor)] = of_tensor.numpy()
                totals[i] = _sum_by_halving(padded)
    return totals


def _norm_parts(
    tensors: list[tuple[Tensor, Tensor | None]],
) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """Yields flat pieces of whole rows of 1024 elements, as many at a time as fit into a chunk, and their masks."""
    pieces: list[Tensor] = []
    masks: list[Tensor | None] = []
    size = reference.NORM_CHUNK
    room = left = _CHUNK_BYTES // 8 // size
    for tensor, bits in tensors:
        flat, start = tensor.reshape(-1), 0
        while start < len(flat):
            if left == 0:
                yield pieces, masks
                pieces, masks, left = [], [], room
            piece = flat[start : start + left * size] if len(flat) - start > left * size or start > 0 else flat
            pieces.append(piece)
            masks.append(None if bits is None else bits[start // 8 : start // 8 + packed_size(len(piece))])
            left -= -(-len(piece) // size)
            start += len(piece)
    if pieces:
        yield pieces, masks


def _sums_of_rows(pieces: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """Returns the sums of the squares in each row of 1024 elements of flat pieces, in double."""
    size = reference.NORM_CHUNK
    lengths = [-(-len(piece) // size) * size for piece in pieces]
    squares = torch.zeros(sum(lengths), dtype=torch.float64, device=pieces[0].device)
    places = [
        place if len(place) == len(piece) else place[: len(piece)]
        for place, piece in zip(squares.split(lengths), pieces, strict=True)
    ]
    torch._foreach_copy_(places, pieces)
    squares.square_()
    for place, bits in zip(places, masks, strict=True):
        if bits is not None:
            place.masked_fill_(unpack(bits, place.shape).logical_not_(), 0.0)
    return reference.sum_by_halving(squares.view(-1, size))


def _sum_by_halving(x: "npt.NDArray[np.float64]") -> float:
    """Adds up as `reference.sum_by_halving` does, without an operation of torch for each line."""
    with np.errstate(over="ignore"):
        while len(x) > 1:
            x = x[: len(x) // 2] + x[len(x) // 2 :]
    return float(x[0])
