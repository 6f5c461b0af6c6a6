"""What a row says of layers that are unlike trained ones, and of the same weights in random order."""

import math
import re

import pytest
import torch
from torch import nn

from childtune_fast import spectra


def row_of(weight, **options):
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    (row,) = spectra.analyze(layer, progress=False, **options)
    return row


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_nan(weight):
    weight[3, 4] = math.nan
    return weight


def with_infinity(weight):
    weight[3, 4] = -math.inf
    return weight


FITTED = ("alpha", "D", "sigma", "xmin", "alpha_weighted", "log_alpha_norm", "alpha_hill")
NORMS = ("xmax", "log_norm", "log_spectral_norm", "stable_rank")


@pytest.mark.parametrize(
    ("weight", "status", "has_norms"),
    [
        (torch.zeros(32, 32), "all zero", False),
        (with_nan(gaussian(32, 32)), "not finite", False),
        (with_infinity(gaussian(32, 32)), "not finite", False),
        (torch.full((32, 32), 1e200, dtype=torch.float64), "not finite", False),  # its squares are infinite
        (gaussian(32, 32) * 1e-6, "only 0 eigenvalues above 1e-05", True),
        (torch.ones(32, 32), "only 1 eigenvalues above 1e-05", True),
        (torch.eye(32), "all eigenvalues equal", True),
        (nn.init.orthogonal_(torch.empty(32, 48)), "all eigenvalues equal", True),
    ],
)
def test_a_layer_without_a_fit_says_why_and_has_no_alpha(weight, status, has_norms):
    row = row_of(weight, null=1)
    assert row.status == status
    assert all(math.isnan(getattr(row, name)) for name in FITTED)
    assert all(math.isfinite(getattr(row, name)) == has_norms for name in NORMS)
    assert (row.flag, row.num_pl_spikes) == ("", 0)


def test_layers_without_a_fit_are_not_averaged():
    torch.manual_seed(0)
    good, bad = nn.Linear(32, 32), nn.Linear(32, 32)
    nn.init.zeros_(bad.weight)
    found, alone = (spectra.analyze(nn.Sequential(*layers), progress=False) for layers in ((good, bad), (good,)))
    assert found.summary() == {**alone.summary(), "layers": 2}
    empty = spectra.analyze(bad, progress=False).summary()
    assert (empty["layers"], empty["fitted"], empty["above_6"], empty["flagged"]) == (1, 0, 0, 0)
    assert all(math.isnan(empty[name]) for name in ("alpha", "log_norm", "alpha_median", "alpha_min", "alpha_max"))


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
@pytest.mark.parametrize("rank", [9, 20, 33])
def test_the_rank_of_a_low_rank_matrix_is_exact(shape, rank):
    """The Gram matrix alone would take rounding errors for singular values."""
    weight = gaussian(shape[0], rank).double() @ gaussian(rank, shape[1], seed=1).double()
    row = row_of(weight)
    assert row.matrix_rank == rank
    assert row.num_pl_spikes <= rank
    assert row_of(weight, dtype=torch.float32).matrix_rank <= rank


def test_float32_is_near():
    weight = gaussian(128, 64) @ torch.diag(torch.linspace(0.1, 3, 64))
    precise, fast = row_of(weight), row_of(weight, dtype=torch.float32)
    for name in (*FITTED, *NORMS):
        assert getattr(fast, name) == pytest.approx(getattr(precise, name), rel=1e-3), name
    assert fast != precise  # so it was computed otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_every_precision_are_read_exactly(dtype):
    weight = gaussian(48, 32).to(dtype)
    row = row_of(weight)
    assert row.xmax == pytest.approx(float(torch.linalg.svdvals(weight.double()).max().square()), rel=1e-12)
    assert row == row_of(weight.double())


def test_strides_make_no_difference():
    """But for the last bits, since sums are in another order."""
    weight = gaussian(48, 32)
    strided, plain = row_of(weight.T.contiguous().T, null=1), row_of(weight, null=1)
    assert strided.rand_spikes == plain.rand_spikes
    for name in (*FITTED, *NORMS):
        assert getattr(strided, name) == pytest.approx(getattr(plain, name), rel=1e-11), name


# ---- Beside the null -----------------------------------------------------------------------------------------------


def test_a_random_layer_has_hardly_a_spike_and_a_learned_one_has():
    spikes = [row_of(gaussian(96, 64, seed=seed), null=1).rand_spikes for seed in range(40)]
    assert sum(count > 0 for count in spikes) <= 26  # half of them, as the two are alike: 20 and twice its error
    assert max(spikes) <= 2
    learned = gaussian(96, 64) + gaussian(96, 9, seed=1) @ gaussian(9, 64, seed=2)
    assert row_of(learned, null=1).rand_spikes >= 6


def test_the_flag_needs_both_signs():
    """A layer with a high alpha is flagged only if its spectrum is that of its own weights in random order."""
    flat = nn.init.uniform_(torch.empty(1500, 300), generator=torch.Generator().manual_seed(0)) - 0.5
    random = row_of(flat, null=1)
    assert random.alpha > 6
    assert random.rand_spikes <= 2
    assert random.flag == "no sign of training"
    assert row_of(flat).flag == ""  # without a null nothing is claimed
    assert row_of(flat).rand_spikes is None
    learned = row_of(flat + 0.04 * gaussian(1500, 4, seed=1) @ gaussian(4, 300, seed=2), null=1)
    assert learned.rand_spikes == 4
    assert learned.flag == ""


def test_a_layer_s_null_depends_on_seed_and_name_alone():
    torch.manual_seed(0)
    first, second = nn.Linear(48, 40), nn.Linear(48, 40)
    both = nn.ModuleDict({"a": first, "b": second})
    found = {row.longname: row for row in spectra.analyze(both, null=1, progress=False)}
    alone = spectra.analyze(nn.ModuleDict({"b": second}), null=1, progress=False)
    assert found["b"] == alone.rows[0]
    learned = nn.ModuleDict({"b": nn.Linear(48, 40)})
    with torch.no_grad():
        learned["b"].weight.copy_(gaussian(40, 48) + 0.2 * gaussian(40, 30, seed=1) @ gaussian(30, 48, seed=2))
    of_seeds = {spectra.analyze(learned, null=1, seed=s, progress=False).rows[0].rand_spikes for s in range(12)}
    assert len(of_seeds) > 1
    more = spectra.analyze(learned, null=12, progress=False).rows[0].rand_spikes
    assert more <= min(of_seeds) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null": -1}, "analyze: null must be a number of shuffles, 0 or more (got int -1)"),
        ({"null": True}, "analyze: null must be"),
        ({"null": 0.5}, "analyze: null must be"),
        ({"dtype": torch.bfloat16}, "analyze: dtype must be torch.float64, torch.float32 or None (got torch.bfloat16)"),
        ({"seed": -1}, "analyze: seed must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        spectra.analyze(nn.Linear(32, 32), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^analyze: model must be a torch.nn.Module, a state dict, a path or a name"):
        spectra.analyze(3)
    with pytest.raises(TypeError, match=r"^analyze: base must be"):
        spectra.analyze(nn.Linear(32, 32), base=nn.Linear(32, 32).weight)
    with pytest.raises(TypeError, match=r"^analyze: child must be a ChildNetwork"):
        spectra.analyze(nn.Linear(32, 32), child={})


@pytest.mark.parametrize("rank", [4, 8, 30])
def test_float32_fits_no_rounding_errors(rank):
    """Of a matrix of low rank, most of the eigenvalues are some, far above what is left out of the fit."""
    weight = gaussian(256, rank).double() @ gaussian(rank, 256, seed=1).double()
    precise, fast = row_of(weight), row_of(weight, dtype=torch.float32)
    assert fast.matrix_rank == precise.matrix_rank == rank
    assert fast.status == precise.status
    assert (fast.alpha, fast.entropy) == pytest.approx((precise.alpha, precise.entropy), rel=1e-3, nan_ok=True)


def test_an_upper_half_of_equal_eigenvalues_has_no_hill_estimate(tmp_path):
    weight = torch.eye(64)
    weight[0, 0] = 0.5
    row = row_of(weight)
    assert row.status == "success"
    assert math.isnan(row.alpha_hill)


def test_infinity_is_written_as_nothing(tmp_path):
    row = spectra.Row("a", "dense", 9, 9, 1.0, 1, 9, delta_rel=math.inf)
    spectra.Spectra([row], {}, None).to_json(tmp_path / "s.json")
    assert math.isnan(spectra.Spectra.from_json(tmp_path / "s.json").rows[0].delta_rel)


def test_a_sum_beyond_float64_is_not_finite():
    """Each slice of the kernel has finite squares, and so has their sum; all slices together have not."""
    kernel = nn.Conv2d(16, 16, (1, 4), bias=False).double()
    kernel.weight = nn.Parameter((3e153 * torch.eye(16, dtype=torch.float64))[:, :, None, None].repeat(1, 1, 1, 4))
    (row,) = spectra.analyze(kernel, null=1, progress=False)
    assert row.status == "not finite"
    assert all(math.isnan(value) for value in (row.alpha, row.log_norm, row.stable_rank, row.entropy))


def test_an_eigensolver_that_does_not_converge_is_helped_out(monkeypatch):
    weight = gaussian(48, 32)
    expected = row_of(weight)

    def fail(matrix):
        raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    assert row_of(weight).alpha == pytest.approx(expected.alpha, rel=1e-10)


def test_lazily_negated_weights_are_read():
    layer = nn.Linear(16, 16, bias=False)
    base = {"weight": torch._neg_view(layer.weight.detach())}
    (row,) = spectra.analyze(layer, base=base, progress=False)
    assert row.moved == 256
    assert row.delta_rel == pytest.approx(2, rel=1e-6)
