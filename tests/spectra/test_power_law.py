"""The fit of a power law against one that tries every xmin and looks at every eigenvalue; and Hill's estimate."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from childtune_fast.spectra.power_law import fit, hill

# Both sides sum up to a few thousand logarithms of at most 23, and take a difference. The sum's error, some eps of it,
# is less than 1e-12 of what is left: eigenvalues here differ by more than a few per cent, or not at all.
WITHIN = 1e-12


def distances(spectrum, tails=None):
    """Returns alpha and the Kolmogorov-Smirnov distance for tails from each eigenvalue on; NaN where none is fitted."""
    n = len(spectrum)
    small = n < 20
    alphas, found = np.full((2, n), np.nan)
    for i in range(n - (8 if small else 2) + 1) if tails is None else tails:
        tail = spectrum[i:]
        k = len(tail)
        excess = np.sum(np.log(tail / spectrum[i]))
        if excess > 0:
            alphas[i] = 1 + (k - 1 if small else k) / excess
            fitted = 1 - (tail / spectrum[i]) ** (1 - alphas[i])
            found[i] = np.max(np.abs(fitted - np.arange(k) / k))
    return alphas, found


def check(spectrum):
    """Asserts that the fit of a spectrum is the first of those with the lowest distance."""
    alphas, found = distances(spectrum)
    at = int(np.nanargmin(found))
    law = fit(torch.tensor(spectrum))
    assert law.xmin == spectrum[at]
    assert law.alpha == pytest.approx(alphas[at], rel=WITHIN)
    assert abs(law.D - found[at]) < WITHIN
    assert law.sigma == pytest.approx((alphas[at] - 1) / math.sqrt(len(spectrum) - at), rel=10 * WITHIN)


def gaussian(random, n):
    """Returns the eigenvalues of a random matrix."""
    matrix = torch.tensor(random.normal(size=(3 * n // 2, n)))
    return torch.linalg.eigvalsh(matrix.T @ matrix / n).numpy()


def spiked(random, n):
    """Returns eigenvalues that follow a power law above a bulk that does not, as those of trained layers do."""
    return np.concatenate([random.random(n - n // 4), 1 + random.pareto(1.5, n // 4)])


SPECTRA = {
    "lognormal": lambda random, n: random.lognormal(0, 1, n),
    "wide": lambda random, n: 10 ** random.uniform(-5, 10, n),
    "pareto": lambda random, n: 1 + random.pareto(2, n),
    "tied": lambda random, n: np.ceil(5 * random.pareto(1.5, n)),
    "gaussian": gaussian,
    "spiked": spiked,
}


@functools.cache
def make(kind, n, seed=0):
    """Returns a spectrum, ascending."""
    return np.sort(SPECTRA[kind](np.random.default_rng([seed, n]), n))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("n", [*range(8, 22), 100, 1000])
def test_equals_the_search_of_everything(kind, n):
    for seed in range(5 if n < 1000 else 1):
        check(make(kind, n, seed))


@pytest.mark.parametrize("kind", ["lognormal", "wide", "pareto", "tied", "spiked"])
def test_equals_the_search_of_everything_among_many(kind):
    check(make(kind, 3000))


# Tenths of a decade: eigenvalues that are not equal differ by a quarter or more, and many are equal.
EXPONENTS = st.integers(-50, 100).map(lambda tenths: tenths / 10)


@settings(deadline=None, max_examples=300)
@given(st.lists(EXPONENTS, min_size=8, max_size=60))
def test_equals_the_search_of_everything_on_any_spectrum(exponents):
    spectrum = np.sort(10.0 ** np.array(exponents))
    _, found = distances(spectrum)
    assume(np.isfinite(found).any())
    nearest = np.unique(spectrum[found <= np.nanmin(found) + WITHIN])
    law = fit(torch.tensor(spectrum))
    assert law.xmin in nearest  # if they are as near but for rounding, any of them
    if len(nearest) == 1:
        check(spectrum)


@pytest.mark.parametrize(
    ("counts", "lowest", "distance"),
    [((5, 6, 2, 3), 1.0, 1 / 4), ((4, 4, 3, 2, 2), 1.0, 1 / 5), ((1, 6, 6, 2, 3), 2.0, 1 / 4)],
)
def test_of_equally_near_fits_the_lowest_xmin_is_taken(counts, lowest, distance):
    """The distance is attained at equal eigenvalues, where the fit is 0 and both sides are exact."""
    spectrum = np.repeat(2.0 ** np.arange(len(counts)), counts)
    _, found = distances(spectrum)
    assert np.sum(found == distance) == 2
    assert np.nanmin(found) == distance
    assert (fit(torch.tensor(spectrum)).xmin, fit(torch.tensor(spectrum)).D) == (lowest, distance)


def test_the_largest_layers_have_no_nearer_fit_among_many_tails():
    spectrum = make("spiked", 15_000)
    law = fit(torch.tensor(spectrum))
    at = int(np.searchsorted(spectrum, law.xmin))
    tails = {*range(0, 14_990, 150), *range(at - 30, at + 30)}
    alphas, found = distances(spectrum, sorted(tails))
    assert int(np.nanargmin(found)) == at
    assert abs(law.D - found[at]) < WITHIN
    assert law.alpha == pytest.approx(alphas[at], rel=WITHIN)


@pytest.mark.parametrize("kind", ["lognormal", "wide", "spiked", "pareto"])
def test_does_not_depend_on_the_unit(kind):
    """A power of 2 makes no rounding errors."""
    spectrum = make(kind, 500)
    law, scaled = fit(torch.tensor(spectrum)), fit(torch.tensor(spectrum * 2.0**-20))
    assert scaled.xmin == law.xmin * 2.0**-20
    assert (scaled.alpha, scaled.D) == pytest.approx((law.alpha, law.D), rel=WITHIN)


@pytest.mark.parametrize("exponent", [1.7, 2.5, 4.0])
def test_finds_the_exponent_of_a_power_law(exponent):
    """Pareto's distribution with shape a has the density x ** -(a + 1)."""
    spectrum = np.sort(1 + np.random.default_rng(1).pareto(exponent - 1, 4000))
    law, upper = fit(torch.tensor(spectrum)), hill(torch.tensor(spectrum))
    assert abs(law.alpha - exponent) < 4 * law.sigma
    assert abs(upper - exponent) < 4 * (exponent - 1) / math.sqrt(2000)


class FullTails(TorchDispatchMode):
    """Counts the tails of which the fit is computed at every eigenvalue, n of them."""

    def __init__(self, n):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.exp.default and result.shape[-1] == self.n:
            self.count += len(result)
        return result


@pytest.mark.parametrize(
    ("kind", "n", "share"),
    [("gaussian", 800, 0.1), ("lognormal", 2000, 0.1), ("spiked", 2000, 0.1), ("pareto", 2000, 0.5)],
)
def test_few_tails_are_looked_at_in_full(kind, n, share):
    """Of what is a power law from end to end, many tails are about as near as the nearest one."""
    for seed in range(3):
        spectrum = torch.tensor(make(kind, n, seed))
        with FullTails(n) as looked_at:
            fit(spectrum)
        assert 0 < looked_at.count <= share * n


@pytest.mark.parametrize("n", [2, 3, 8, 9, 1000])
def test_hill_is_the_mean_of_logarithms_above_the_middle(n):
    spectrum = make("lognormal", n)
    upper = n // 2
    by_definition = np.mean(np.log(spectrum[n - upper :] / spectrum[n - upper - 1]))
    assert hill(torch.tensor(spectrum)) == pytest.approx(1 + 1 / by_definition, rel=WITHIN)
