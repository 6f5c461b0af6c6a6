"""The spectra against weightwatcher itself, column by column, on layers of every kind that it knows."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("weightwatcher") is None:  # whose import would change this process
    pytest.skip("needs weightwatcher", allow_module_level=True)

pytest.importorskip("transformers")  # of which two of the models are

from spectra_models import MODELS, PACKAGED, checksum

from childtune_fast import spectra

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "weightwatcher_rows.py"
MINILM = pytest.param("minilm", marks=pytest.mark.skipif("minilm" not in MODELS, reason=f"needs {PACKAGED}"))
NAMES = ["bert", "gpt2", "convolutions", "linears", "deficient", "edges", "halves", MINILM]

EQUAL = ("layer_type", "rf", "num_evals", "num_pl_spikes", "matrix_rank", "status")
# Sums of squares, and the largest eigenvalue. The largest layer has 30,522 rows to sum over: 30,522 eps = 7e-12.
NORMS = ("xmax", "log_norm", "log_spectral_norm", "stable_rank", "entropy")
NORMS_WITHIN = 1e-11
# weightwatcher computes singular values, we the eigenvalues of a Gram matrix; both err by some eps of the largest
# eigenvalue. So one that is 1e5 times smaller, as no xmin here is, has 30 eps * 1e5 = 7e-10 of itself. The places where
# D is attained are such eigenvalues, alpha is a mean of their logarithms, and the rest are multiples of alpha.
FITTED = ("alpha", "D", "sigma", "xmin", "alpha_weighted", "log_alpha_norm")
FITTED_WITHIN, LOWEST_XMIN = 1e-9, 1e-5


@pytest.fixture(scope="module")
def found():
    """Returns {model: (our spectra, weightwatcher's rows)}; both are computed at the same time."""
    # On a GPU it computes in float32. Its many small operations take several times longer on several threads.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(SCRIPT)], env=env, **pipes) as process:
        ours, checksums = {}, {}
        for name, make in MODELS.items():
            model = make()
            ours[name], checksums[name] = spectra.analyze(model, null=1, progress=False), checksum(model)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    theirs = json.loads(output.splitlines()[-1])
    assert checksums == {name: model["checksum"] for name, model in theirs.items()}
    return {name: (ours[name], theirs[name]["rows"]) for name in MODELS}


def columns(row, names):
    """Returns some columns of a row of either kind."""
    return {name: row[name] if isinstance(row, dict) else getattr(row, name) for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_those_of_weightwatcher_in_its_order(name, found):
    ours, theirs = found[name]
    assert [row.longname for row in ours] == [row["longname"] for row in theirs]


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_those_of_weightwatcher(name, found):
    for row, expected in zip(*found[name], strict=True):
        assert row.xmin > LOWEST_XMIN * row.xmax
        assert columns(row, EQUAL) == columns(expected, EQUAL), row.longname
        norms, fitted = columns(expected, NORMS), columns(expected, FITTED)
        assert columns(row, NORMS) == pytest.approx(norms, rel=NORMS_WITHIN, abs=NORMS_WITHIN), row.longname
        assert columns(row, FITTED) == pytest.approx(fitted, rel=FITTED_WITHIN, abs=0), row.longname


@pytest.mark.parametrize("name", NAMES)
def test_sides_are_those_of_weightwatcher_but_where_it_swaps_them(name, found):
    """It swaps N and M once more for each place of a kernel with more inputs than outputs, so Q may be below 1.

    It starts from outputs and inputs, and so ends with N < M after an even number of places. It swaps nothing if a
    kernel has more places in a row and a column than channels in and out.
    """
    swapped = {"convolutions": ["even_narrowing", "wide_narrowing"]}
    ours, theirs = found[name]
    assert [row["longname"] for row in theirs if row["N"] < row["M"]] == swapped.get(name, [])
    for row, expected in zip(ours, theirs, strict=True):
        sides = expected["N"], expected["M"]
        assert (max(sides), min(sides)) == (row.N, row.M)
        assert row.Q == row.N / row.M
        assert expected["Q"] == expected["N"] / expected["M"]


def test_fits_of_layers_with_fewer_than_20_eigenvalues_are_among_those_compared(found):
    """weightwatcher fits these in another way."""
    fitted = {row.longname: row.num_evals for name in ("linears", "convolutions") for row in found[name][0]}
    assert {8, 12, 19, 20, 21} <= set(fitted.values())
    assert fitted["wide_narrowing"] == 3 * 49


def test_what_is_not_fitted_here_has_an_alpha_there_that_says_nothing(found):
    """It gives -1 to a layer of zeros, infinity to equal eigenvalues but for rounding, and fits any five."""
    ours, theirs = found["without_fit"]
    assert [row.status for row in ours] == ["all zero", "all eigenvalues equal", "only 5 eigenvalues above 1e-05"]
    assert all(math.isnan(row.alpha) and row.num_pl_spikes == 0 for row in ours)
    zeros, equal, five = (row["alpha"] for row in theirs)
    assert zeros == -1
    assert equal > 1e6
    assert 1 < five < 2


@pytest.mark.skipif("minilm" not in MODELS, reason=f"needs {PACKAGED}")
def test_a_real_model(found):
    ours, _ = found["minilm"]
    numbers = ours.summary()
    assert numbers["layers"] == numbers["fitted"] == 39
    assert (round(numbers["alpha"], 3), round(numbers["alpha_median"], 3)) == (4.117, 3.550)
    assert (round(numbers["alpha_min"], 2), round(numbers["alpha_max"], 2)) == (1.55, 12.35)
    assert numbers["above_6"] == 4
    assert [row.longname for row in ours if row.flag] == ["pooler.dense"]
