"""Fits a power law to the eigenvalues of a layer, as weightwatcher does it, exactly and in far fewer operations.

The density p(x) of the eigenvalues from some `xmin` on is taken to be proportional to x ** -alpha. For each possible
`xmin` alpha is the maximum-likelihood estimate, and the `xmin` is taken whose fit is nearest to the eigenvalues, by the
Kolmogorov-Smirnov distance (Clauset, Shalizi and Newman, "Power-law distributions in empirical data", SIAM Review 51,
2009, equations 3.1 and 3.9).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 20  # fewer eigenvalues than that are fitted by weightwatcher with the bias of alpha corrected,
SMALL_TAIL = 8  # and no fewer than that of them
_PROBES = 48  # places of a tail at which its distance is looked at first
_FIRST = 16  # tails that are looked at in full at first, and the
_SHARE = (
    8  # part of all tails that are looked at together at most, which takes less memory than the layer's Gram matrix
)


class PowerLaw(NamedTuple):
    """A power law that was fitted to eigenvalues, in weightwatcher's names.

    Attributes:
        alpha: exponent of the density.
        D: Kolmogorov-Smirnov distance between the fit and the eigenvalues from `xmin` on.
        sigma: standard error of alpha, (alpha - 1) / sqrt(number of eigenvalues from `xmin` on).
        xmin: the eigenvalue that the power law begins at.
    """

    alpha: float
    D: float
    sigma: float
    xmin: float


def fit(eigenvalues: Tensor) -> PowerLaw:
    """Returns the power law that is nearest to the eigenvalues; of equally near ones, that of the lowest xmin.

    A tail's distance is no lower than the one at a few places of it. So tails are taken in the order of that bound, and
    looked at in full until the next bound is above the lowest distance so far.

    Args:
        eigenvalues: float64 [n] on the CPU, ascending, all above 0, at least `SMALL_TAIL` of them, and not all equal.
    """
    n = eigenvalues.numel()
    log = (eigenvalues / eigenvalues[-1]).log()  # near 0 for nearly equal ones, whatever their size
    size = torch.arange(n, 0, -1, dtype=torch.float64, device="cpu")  # of the tail that begins at each eigenvalue
    small = int(n < SMALL)
    excess = log.flip(0).cumsum(0).flip(0) - size * log  # sum of log(x / xmin) over the tail
    alpha = 1 + (size - small) / excess
    fitted = (excess > 0) & (size >= (SMALL_TAIL if small else 2))

    def distances(tail: Tensor, place: Tensor) -> Tensor:
        """Returns how far fit and eigenvalues are apart, for tails [R, 1] at places [K] or [R, K] of the spectrum."""
        of_fit = 1 - torch.exp((1 - alpha[tail]) * (log[place] - log[tail]))
        return (of_fit - (place - tail) / size[tail]).abs_()

    tails = fitted.nonzero()  # [R, 1]
    share = torch.linspace(0, 1, _PROBES, dtype=torch.float64, device="cpu")
    bound = distances(tails, (tails + share * (n - 1 - tails)).round().long()).amax(1)
    order, everywhere = bound.argsort(), torch.arange(n, device="cpu")
    best, found, at, count = math.inf, n, 0, _FIRST
    while at < len(order) and bound[order[at]] <= best:
        some = tails[order[at : at + count]]
        farthest = distances(some, everywhere).masked_fill_(everywhere < some, 0.0).amax(1)
        nearest = float(farthest.min())
        first = int(some[farthest == nearest].min())
        if (nearest, first) < (best, found):
            best, found = nearest, first
        at, count = at + count, min(2 * count, max(_FIRST, n // _SHARE))
    exponent = float(alpha[found])
    return PowerLaw(exponent, best, (exponent - 1) / math.sqrt(n - found), float(eigenvalues[found]))


def hill(eigenvalues: Tensor) -> float:
    """Returns Hill's estimate of alpha from the upper half of the eigenvalues, which looks for no xmin.

    It is PL_Alpha_Hill of TempBalance (Zhou et al., NeurIPS 2023, equation 2) and AlphaPruning, and NaN if that half
    is all equal.

    Args:
        eigenvalues: float64 [n], ascending, all above 0, at least 2 of them.
    """
    k = eigenvalues.numel() // 2
    excess = (eigenvalues[-k:] / eigenvalues[-k - 1]).log().sum()
    return float(1 + k / excess) if excess > 0 else math.nan
