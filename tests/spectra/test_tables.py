"""Spectra as tables, files and pictures."""

import copy
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from childtune_fast import spectra


def model(seed=0):
    torch.manual_seed(seed)
    found = nn.ModuleDict({"in": nn.Linear(40, 48), "conv": nn.Conv2d(16, 24, 3), "zero": nn.Linear(40, 40)})
    nn.init.zeros_(found["zero"].weight)
    found["small"] = nn.Linear(3, 4)
    return found


@pytest.fixture(scope="module")
def found():
    return spectra.analyze(model(), null=1, progress=False)


@pytest.fixture(scope="module")
def tuned():
    after = copy.deepcopy(model())
    with torch.no_grad():
        after["in"].weight[:12] += 0.1
    return spectra.analyze(after, base=model(), progress=False)


def test_the_printed_table_has_a_line_for_each_layer_and_shows_what_there_is(found, tuned):
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["in", "conv", "zero"]
    head = lines[0].split()
    assert {"longname", "alpha", "rf", "rand_spikes", "status"} <= set(head)
    assert not {"moved", "child_density"} & set(head)
    row = found.rows[0]
    assert lines[1].split()[head.index("alpha")] == f"{row.alpha:.3f}"
    assert "all zero" in lines[3]
    summary = found.summary()
    assert lines[-1].startswith(f"3 layers; alpha: mean {summary['alpha']:.3f}, median {summary['alpha_median']:.3f}")
    assert lines[-1].endswith("1 skipped")
    assert "moved" in str(tuned)
    assert "480" in str(tuned).splitlines()[1]  # 12 x 40
    assert len({len(line) for line in lines[:3]}) <= 2  # columns are aligned: only the last may end early


def test_a_summary_has_weightwatcher_s_means(found):
    fitted = found.rows[:2]
    for name in ("alpha", "log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm", "stable_rank"):
        assert found.summary()[name] == pytest.approx(sum(getattr(row, name) for row in fitted) / 2, rel=1e-15)
    assert found.summary()["layers"] == 3
    assert found.summary()["fitted"] == 2


def test_a_file_holds_everything(found, tuned, tmp_path):
    for of_one in (found, tuned):
        of_one.to_json(tmp_path / "spectra.json")
        again = spectra.Spectra.from_json(tmp_path / "spectra.json")
        assert repr(again.rows) == repr(of_one.rows)  # which shows NaN and None apart, and every digit
        assert (again.skipped, again.outside) == (of_one.skipped, of_one.outside)
        json.loads((tmp_path / "spectra.json").read_text(), parse_constant=pytest.fail)  # it has no NaN


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"kind": "other"}', '{"kind": "spectra of childtune_fast", "rows": [{}]}']
)
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json' must be a file that Spectra.to_json wrote"):
        spectra.Spectra.from_json(tmp_path / "x.json")


def test_pandas_gets_every_column_that_there_is(found):
    pandas = pytest.importorskip("pandas")
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table.longname) == ["in", "conv", "zero"]
    assert table.alpha.iloc[0] == found.rows[0].alpha
    assert math.isnan(table.alpha.iloc[2])
    assert "moved" not in table
    assert "rand_spikes" in table


def test_pandas_is_not_needed_for_anything_else(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        found.to_pandas()


# ---- Two models ----------------------------------------------------------------------------------------------------


def test_a_comparison_has_the_layers_of_both(found):
    other = nn.ModuleDict({"encoder": model(seed=1), "head": nn.Linear(40, 9)})
    compared = spectra.compare(found, spectra.analyze(other, progress=False))
    assert [row.longname for row in compared] == ["encoder.in", "encoder.conv", "encoder.zero"]
    assert compared.alone == ["head"]
    for row, before in zip(compared, found, strict=True):
        assert row.before == before
    assert compared.rows[0].alpha == compared.rows[0].after.alpha - compared.rows[0].before.alpha != 0
    lines = str(compared).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["encoder.in", "encoder.conv", "encoder.zero"]
    assert lines[4] == "in one of them only: head"


def test_what_is_no_spectra_is_refused(found):
    with pytest.raises(TypeError, match=r"^compare: after must be a Spectra \(got ModuleDict\)"):
        spectra.compare(found, model())


# ---- Pictures ------------------------------------------------------------------------------------------------------


def texts_of(path):
    """The words in an SVG picture, whose letters matplotlib draws as paths with a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_a_picture_of_one_model_names_its_layers(found, tuned, tmp_path):
    figure = found.plot(tmp_path / "alpha.svg")
    words = texts_of(tmp_path / "alpha.svg")
    assert {"in", "conv", "zero", "all zero", "alpha, with its standard error"} <= set(words)
    assert len(figure.axes) == 1
    ElementTree.parse(tmp_path / "alpha.svg")
    figure = tuned.plot(tmp_path / "tuned.svg")
    assert len(figure.axes) == 3
    assert "share of the weights" in texts_of(tmp_path / "tuned.svg")
    moved = figure.axes[1].patches[0]
    assert moved.get_width() == pytest.approx(12 / 48)


def test_an_outlier_does_not_flatten_the_others(found, tmp_path):
    rows = [found.rows[0], spectra.Row("far", "dense", 9, 9, 1.0, 1, 9, alpha=113.0, sigma=40.0, D=0.1, xmin=1.0)]
    one = spectra.Spectra(rows, {}, None)
    axes = spectra.plot_alpha({"one": one}, tmp_path / "a.png").axes[0]
    assert axes.get_xlim()[1] < 12
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert axes.patches[0].get_height() == pytest.approx(1 / 2)  # the bar of what is above 10
    assert one.plot().axes[0].get_xlim()[1] < 12


def test_several_models_are_laid_over_each_other(found, tuned, tmp_path):
    spectra.plot_alpha({"GPT": found, "GPT-2": tuned}, tmp_path / "overlay.svg")
    words = texts_of(tmp_path / "overlay.svg")
    medians = [
        f"{name}: 2 layers, median {of.summary()['alpha_median']:.2f}"
        for name, of in (("GPT", found), ("GPT-2", tuned))
    ]
    assert set(medians) <= set(words)


def test_a_picture_without_anything_to_draw_is_refused(found, tmp_path):
    empty = spectra.Spectra([], {}, None)
    with pytest.raises(ValueError, match=r"^Spectra.plot: there must be a layer"):
        empty.plot()
    with pytest.raises(ValueError, match=r"without one"):
        spectra.plot_alpha({"a": found, "b": empty})
    with pytest.raises(ValueError, match=r"^plot_alpha: models must not be empty"):
        spectra.plot_alpha({})
    with pytest.raises(TypeError, match=r"^plot_alpha: models must be a mapping"):
        spectra.plot_alpha(found)
    with pytest.raises(ValueError, match=r"a picture's name must end with its format, .* \(got '.*a\.txt'\)"):
        found.plot(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_picture_says_what_it_needs(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot()
