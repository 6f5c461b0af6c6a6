"""The overlay of alphas: its curves are densities, every layer is in it, and equal data give equal bytes."""

import math

import numpy as np
import pytest

from childtune_fast import spectra
from childtune_fast.spectra.row import Row

ALPHAS = [1.02, 2.5, 2.9, 3.4, 3.5, 6.7, 9.9, 10.1, 113.0, math.nan]


def spectra_of(alphas):
    rows = [
        Row(f"{i}", "dense", 8, 8, 1.0, 1, 8, alpha=alpha, status="all zero" if math.isnan(alpha) else "success")
        for i, alpha in enumerate(alphas)
    ]
    return spectra.Spectra(rows, {}, None)


def test_the_areas_are_the_shares_of_the_layers_and_each_layer_has_a_tick():
    axes = spectra.plot_alpha({"one": spectra_of(ALPHAS), "other": spectra_of([20.0, 30.0])}).axes[0]
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 2]
    areas = [float(np.trapezoid(curve[:, 1], curve[:, 0])) for curve in curves]
    bars = [bar.get_height() for bar in axes.patches]
    assert areas == pytest.approx([7 / 9, 0], abs=1e-3)
    assert bars == pytest.approx([2 / 9, 1])
    ticks = [
        segment[0, 0] for rows in axes.collections if hasattr(rows, "get_segments") for segment in rows.get_segments()
    ]
    assert ticks == ALPHAS[:7]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["one: 9 layers, median 3.50", "other: 2 layers, median 25.00"]


def test_the_curve_is_high_where_layers_are():
    axes = spectra.plot_alpha({"one": spectra_of([3.0, 3.0, 3.0, 7.0])}).axes[0]
    place, height = axes.lines[0].get_xydata().T
    assert place[height.argmax()] == pytest.approx(3, abs=0.05)
    at = dict(zip((3, 5, 7), np.interp((3, 5, 7), place, height), strict=True))
    assert at[3] == pytest.approx(3 * at[7], rel=0.01)
    assert at[5] < 0.01 * at[7]


def test_more_models_than_colours_are_told_apart_by_their_lines():
    axes = spectra.plot_alpha({f"{i}": spectra_of(ALPHAS) for i in range(15)}).axes[0]
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.get_legend().get_lines()]
    assert len(set(looks)) == 15


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_equal_models_give_equal_bytes(tmp_path, kind):
    for name in ("first", "second"):
        spectra.plot_alpha({"one": spectra_of(ALPHAS)}, tmp_path / f"{name}.{kind}")
    first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("first", "second"))
    assert first == second
    assert len(first) > 1000


def test_a_model_without_a_fit_is_named():
    with pytest.raises(ValueError, match=r"got 'bad' without one"):
        spectra.plot_alpha({"good": spectra_of(ALPHAS), "bad": spectra_of([math.nan])})
    with pytest.raises(ValueError, match="must not be empty"):
        spectra.plot_alpha({})


def test_any_name_is_drawn_as_it_is(tmp_path):
    names = ["_hidden", "a $x_{$ b"]
    figure = spectra.plot_alpha({name: spectra_of([3.0, 4.0]) for name in names}, tmp_path / "a.png")
    shown = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.replace("\\", "").partition(":")[0] for text in shown] == names
