"""What is told of one layer: its spectrum, the null beside it, and how far it is from its base."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import resolved
from .eigenvalues import difference, eigenvalues, rounding, shuffled
from .layers import Layer
from .power_law import SMALL_TAIL, fit, hill

SUCCESS = "success"
NO_SIGN = "no sign of training"
LEAST = 1e-5  # eigenvalues up to that are left out of the fit, and
EPSILON = 1e-10  # that is added to probabilities and ranks, both as weightwatcher has it
_EQUAL = 1e-4  # by how much eigenvalues differ at most that count as equal; those of orthogonal float32 weights do
UNDER_TRAINED = 6.0  # weightwatcher calls layers with a higher alpha so, and
OVER_TRAINED = 2.0  # those with a lower one
FEW_SPIKES = 2  # more than that has one random layer of a hundred or so (docs/spectra.md)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer. The names and conventions are weightwatcher's, up to `status`; what could not be computed is NaN.

    The eigenvalues are the squares of the layer's singular values; those of a convolution are of its slices [out, in],
    for each place of the kernel, put together, and halved.

    Attributes:
        longname: name of the module, or of a part of it.
        layer_type: "dense", "conv1d" (transformers' Linear with the weight transposed), "conv2d" or "embedding".
        N: longer side of the matrix.
        M: shorter side of the matrix.
        Q: N / M.
        rf: number of slices of a convolution's kernel; else 1.
        num_evals: number of eigenvalues, M * rf.
        alpha: exponent of the power law that was fitted to the largest eigenvalues.
        D: Kolmogorov-Smirnov distance of that fit.
        sigma: standard error of alpha.
        xmin: eigenvalue that the power law begins at.
        xmax: largest eigenvalue.
        num_pl_spikes: number of eigenvalues from xmin on.
        log_norm: log10 of the sum of the eigenvalues, which is the squared Frobenius norm.
        log_spectral_norm: log10 of the largest eigenvalue.
        alpha_weighted: alpha * log_spectral_norm.
        log_alpha_norm: log10 of the sum of the eigenvalues to the power of alpha.
        stable_rank: sum of the eigenvalues by the largest.
        matrix_rank: number of singular values that are not 0 but for rounding; float32 takes more of them for 0.
        entropy: entropy of the eigenvalues as probabilities, by the log of the rank; 1 if all are equal.
        status: "success", or why there is no fit.
        alpha_hill: Hill's estimate of alpha, from the upper half of the eigenvalues.
        rand_spikes: number of eigenvalues above all those of the same weights in random order; None without `null`.
        flag: "no sign of training", where alpha is above 6 and `rand_spikes` at most 2; else "".
        moved: number of weights that are not the base's; None without a base, or if the base lacks the layer. The
            same holds for the next three.
        delta_norm: Frobenius norm of what was added to the base.
        delta_rel: delta_norm by the Frobenius norm of the base.
        delta_stable_rank: stable rank of what was added; NaN if nothing was.
        child_density: share of the weights in the child network; None without one, or if it has no mask for the layer.
    """

    longname: str
    layer_type: str
    N: int
    M: int
    Q: float
    rf: int
    num_evals: int
    alpha: float = math.nan
    D: float = math.nan
    sigma: float = math.nan
    xmin: float = math.nan
    xmax: float = math.nan
    num_pl_spikes: int = 0
    log_norm: float = math.nan
    log_spectral_norm: float = math.nan
    alpha_weighted: float = math.nan
    log_alpha_norm: float = math.nan
    stable_rank: float = math.nan
    matrix_rank: int = 0
    entropy: float = math.nan
    status: str = SUCCESS
    alpha_hill: float = math.nan
    rand_spikes: int | None = None
    flag: str = ""
    moved: int | None = None
    delta_norm: float | None = None
    delta_rel: float | None = None
    delta_stable_rank: float | None = None
    child_density: float | None = None

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.N * self.M * self.rf


def measure(layer: Layer, weights: Sequence[Tensor], dtype: torch.dtype, null: int, seed: int) -> Row:
    """Returns what the weights of a layer say by themselves.

    Args:
        layer: the layer.
        weights: its matrices.
        dtype: float64 or float32, in which eigenvalues are computed.
        null: how many times the weights are shuffled.
        seed: of the shuffles. A layer's depend on it and the layer's name alone.
    """
    found = _pooled(layer, weights, dtype)
    rows, columns = layer.shape
    long, short = max(rows, columns), min(rows, columns)
    row = Row(layer.longname, layer.layer_type, long, short, long / short, layer.slices, len(found))
    row = dataclasses.replace(row, **_norms(found, rounding(weights[0], torch.float64)))
    kept = found[found > LEAST]
    if status := _status(found, kept):
        row = dataclasses.replace(row, status=status)
    else:
        row = dataclasses.replace(row, **_fitted(found, kept))
    if null and found[-1] > 0:
        row = dataclasses.replace(row, **_beside_null(row, layer, found, weights, dtype, null, seed))
    return row


def _pooled(layer: Layer, weights: Iterable[Tensor], dtype: torch.dtype, exact: bool = True) -> Tensor:
    """Returns the eigenvalues of a layer's matrices together, ascending."""
    found = torch.cat([eigenvalues(matrix, dtype, exact) for matrix in weights]).sort().values
    return found / 2 if layer.layer_type == "conv2d" else found


def _status(found: Tensor, kept: Tensor) -> str:
    """Returns why no power law can be fitted to a layer's eigenvalues; "" if one can.

    Args:
        found: all of them, ascending.
        kept: those of them that are not negligible.
    """
    if not found.sum().isfinite():
        return "not finite"
    if found[-1] == 0:
        return "all zero"
    if len(kept) < SMALL_TAIL:
        return f"only {len(kept)} eigenvalues above {LEAST:g}"
    if kept[-1] <= (1 + _EQUAL) * kept[0]:
        return "all eigenvalues equal"
    return ""


def _norms(found: Tensor, least: float) -> dict[str, Any]:
    """Returns the fields that need no fit."""
    top, total = float(found[-1]), float(found.sum())
    if not 0 < total < math.inf:
        return {}
    rank = int((found > top * least**2).sum())  # of singular values, whose squares the eigenvalues are
    share = found / total + EPSILON
    entropy = -float((share * share.log()).sum()) / math.log(rank + EPSILON) if rank > 1 else math.nan
    return {
        "xmax": top,
        "log_norm": math.log10(total),
        "log_spectral_norm": math.log10(top),
        "stable_rank": total / top,
        "matrix_rank": rank,
        "entropy": entropy,
    }


def _fitted(found: Tensor, kept: Tensor) -> dict[str, Any]:
    """Returns the fields that a fit gives."""
    law, top = fit(kept), float(found[-1])
    log_top = math.log10(top)
    return {
        **law._asdict(),
        "num_pl_spikes": int((found >= law.xmin).sum()),
        "alpha_weighted": law.alpha * log_top,
        "log_alpha_norm": math.log10(float((found / top).pow(law.alpha).sum())) + law.alpha * log_top,
        "alpha_hill": hill(kept),
    }


def _beside_null(
    row: Row, layer: Layer, found: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, null: int, seed: int
) -> dict[str, Any]:
    """Returns the fields that compare a layer with its own weights in random order, in which nothing is left of it."""
    from numpy.random import default_rng

    random = default_rng([seed, zlib.crc32(layer.longname.encode())])
    nulls = ((shuffled(matrix, random) for matrix in weights) for _ in range(null))
    top = max(float(_pooled(layer, one, dtype, exact=False)[-1]) for one in nulls)
    spikes = int((found > top).sum())
    return {"rand_spikes": spikes, "flag": NO_SIGN if row.alpha > UNDER_TRAINED and spikes <= FEW_SPIKES else ""}


def beside_base(row: Row, tuned: Sequence[Tensor], base: Sequence[Tensor], dtype: torch.dtype) -> Row:
    """Returns a row with what was added to the base's weights.

    Args:
        row: the layer.
        tuned: its matrices.
        base: those of the base.
        dtype: in which the difference is computed.
    """
    moved, spectra, norm = 0, [], 0.0
    for now, before in zip(tuned, base, strict=True):
        before = before.to(now.device)
        moved += int(differing(now, before).sum())
        spectra.append(eigenvalues(difference(now, before, dtype), dtype, exact=False))
        norm += float(torch.linalg.vector_norm(before, dtype=dtype)) ** 2
    added = torch.cat(spectra)
    total = float(added.sum())
    return dataclasses.replace(
        row,
        moved=moved,
        delta_norm=math.sqrt(total),
        delta_rel=math.sqrt(total / norm) if norm else math.nan,
        delta_stable_rank=total / float(added.max()) if total else math.nan,
    )


def differing(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a bool tensor: which elements differ, by their bits if the dtypes are the same, else by their values."""
    if tensor.dtype != other.dtype:
        return tensor != other
    tensor, other = resolved(tensor), resolved(other)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integers) != other.contiguous().view(integers)
