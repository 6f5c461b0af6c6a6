"""Eigenvalues of a weight matrix's correlations, W^T W: the squares of its singular values."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.random import Generator

_ELEMENTS = 1 << 19  # of a matrix that are converted at a time


def eigenvalues(matrix: Tensor, dtype: torch.dtype, exact: bool = True) -> Tensor:
    """Returns the squared singular values of a matrix, ascending.

    They are computed from the smaller Gram matrix, which is several times faster than singular values are, and errs by
    some rounding errors of the largest. What that cannot tell from 0 becomes 0; if `exact`, float64 takes the singular
    values instead.

    Args:
        matrix: [rows, columns], of any floating dtype and device.
        dtype: float64 or float32, in which it is computed, on the matrix's device.
        exact: whether the smallest of them matter.

    Returns:
        float64 [min(rows, columns)] on the CPU; NaN throughout if an element or a square is not finite.
    """
    gram = _gram(matrix, dtype)
    if not gram.trace().isfinite():  # which has the square of every element in it
        return torch.full((len(gram),), torch.nan, dtype=torch.float64, device="cpu")
    try:
        found = torch.linalg.eigvalsh(gram).double().cpu().clamp_(min=0)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it did not converge
        return _squared_singular_values(matrix)
    least = rounding(matrix, dtype) * found[-1]
    if exact and dtype == torch.float64 and found[0] <= least:
        del gram
        return _squared_singular_values(matrix)
    return found.masked_fill_(found <= least, 0)


def rounding(matrix: Tensor, dtype: torch.dtype) -> float:
    """Returns below which share of the largest eigenvalue a computed one cannot be told from 0."""
    return max(matrix.shape) * torch.finfo(dtype).eps


def _squared_singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double()).cpu().square().flip(0)


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns W^T W or W W^T, whichever is smaller."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=dtype, device=matrix.device)
    for rows in _split(tall):
        converted = rows.to(dtype)
        gram.addmm_(converted.T, converted)
    return gram


def _split(matrix: Tensor) -> tuple[Tensor, ...]:
    """Returns parts of a matrix, of some rows each, so that no more than a part need be converted at a time."""
    return matrix.split(max(1, _ELEMENTS // matrix.shape[1]))


def difference(matrix: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `matrix - other`, computed in `dtype`."""
    found = matrix.to(dtype, copy=True)
    for rows, less in zip(_split(found), _split(other), strict=True):
        rows.sub_(less.to(dtype))
    return found


def shuffled(matrix: Tensor, random: "Generator") -> Tensor:
    """Returns a matrix of the same elements in random order, float32 or, of a float64 matrix, float64."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    flat = matrix.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format).view(-1)
    random.shuffle(flat.numpy())
    return flat.view(matrix.shape).to(matrix.device)
