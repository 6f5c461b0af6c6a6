"""Pictures of spectra, drawn by matplotlib without its global state."""

import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import FilePath, check_type
from ..whole_file import written
from .row import OVER_TRAINED, SUCCESS, UNDER_TRAINED, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that remain apart for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
_TYPES = {"dense": "#0072B2", "embedding": "#E69F00", "conv1d": "#0072B2", "conv2d": "#009E73"}
_FLAGGED = "#D55E00"
_GREY = "#666666"
_END, _ABOVE = 10.0, 10.3  # what is above the first is counted in a bar from the second on
_KERNEL = 0.35  # standard deviation of what smooths a density
_DATES = {"svg": "Date", "pdf": "CreationDate"}  # what would make equal pictures differ
_LINE, _HIGHEST = 0.19, 40.0  # inches that a layer takes, and that all of them take at most


def plot_alpha(models: Mapping[str, Iterable[Row]], path: FilePath | None = None) -> "Figure":
    """Draws how alpha is distributed over the layers of one or more models: a density each, laid over each other.

    The densities are smoothed; below them, each layer is a tick. Lines at 2 and 6 mark the range that weightwatcher
    calls well trained. Layers above 10 are counted in a bar at the right, so that a few of them do not press all others
    together: the area below a model's curve and its bar are 1 together. Layers without a fit are left out.

    Args:
        models: {name in the legend: its Spectra}.
        path: picture to write, of the format that its suffix names; None writes none (default: None).

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no model, or one without any fit, or the path names no format.
        OSError: the file cannot be written.
    """
    check_type("plot_alpha: models", models, Mapping, "a mapping from names to Spectra")
    alphas = {name: np.array([row.alpha for row in found if row.status == SUCCESS]) for name, found in models.items()}
    if empty := [name for name, found in alphas.items() if not len(found)]:
        raise ValueError(f"plot_alpha: each model must have a layer with a fit (got '{empty[0]}' without one)")
    if not alphas:
        raise ValueError("plot_alpha: models must not be empty")
    figure = new_figure(8.5, 4.2 + 0.3 * len(alphas))
    axes = figure.add_subplot()
    _draw_densities(axes, alphas)
    for at, words in ((1 + OVER_TRAINED) / 2, '"over-trained"'), (4.0, '"well trained"'), (8.0, '"under-trained"'):
        axes.text(at, 1.01, words, transform=axes.get_xaxis_transform(), ha="center", color=_GREY, fontsize=8)
    _mark_range(axes)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.04), borderaxespad=0)
    _bare(axes)
    return saved(figure, path)


def by_layer(rows: Sequence[Row], path: FilePath | None) -> "Figure":
    """Draws what `Spectra.plot` promises: layers from top to bottom, and a panel for each thing told of them."""
    if not rows:
        raise ValueError("Spectra.plot: there must be a layer to draw (got none; see .skipped)")
    panels: list[Callable[[Axes, Sequence[Row]], None]] = [_draw_alpha]
    if any(row.moved is not None for row in rows):
        panels += [_draw_moved, _draw_delta]
    line = min(_LINE, _HIGHEST / len(rows))
    figure = new_figure(4.2 + 3.0 * len(panels), 1.3 + line * len(rows))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes, rows)
        axes.grid(axis="y", alpha=0.25)
        _bare(axes)
    all_axes[0].set_yticks(range(len(rows)), [_words(row.longname) for row in rows], fontsize=8 * line / _LINE)
    all_axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return saved(figure, path)


def _draw_densities(axes: "Axes", alphas: "Mapping[str, np.ndarray]") -> None:
    """Draws a curve for each model, a tick for each layer in a row below, and at the right what is above `_END`."""
    place = np.linspace(1, _END, 200)
    densities = [_density(found, place) for found in alphas.values()]
    above = [float((found > _END).mean()) for found in alphas.values()]
    top = 1.05 * max(*above, *(float(density.max()) for density in densities))
    row, width = 0.04 * top, 0.7 / len(alphas)
    for i, (name, found) in enumerate(alphas.items()):
        colour, line = COLOURS[i % len(COLOURS)], _STYLES[i // len(COLOURS) % len(_STYLES)]
        label = f"{_words(name)}: {len(found)} layers, median {np.median(found):.2f}"
        axes.fill_between(place, densities[i], color=colour, alpha=0.15, linewidth=0)
        axes.plot(place, densities[i], color=colour, linestyle=line, linewidth=2, label=label)
        axes.vlines(found[found <= _END], -(i + 1.4) * row, -(i + 0.6) * row, color=colour, linewidth=1)
        axes.bar(_ABOVE + (i + 0.5) * width, above[i], 0.9 * width, color=colour)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="alpha (in quotes: weightwatcher's words)",
        xlim=(1, _ABOVE + 0.9),
        ylim=(-(len(alphas) + 0.8) * row, top),
    )
    axes.set_xticks([*range(1, int(_END) + 1), _ABOVE + 0.35], [*map(str, range(1, int(_END) + 1)), f"> {_END:g}"])
    axes.set_yticks([at for at in axes.get_yticks() if 0 <= at <= top])
    axes.set_ylabel("share of the layers\n(per unit of alpha; above 10 in all)")


def _density(alphas: "np.ndarray", place: "np.ndarray") -> "np.ndarray":
    """Returns a smoothed density of the alphas up to `_END`, whose integral is their share of all.

    What the kernels would leave beyond the ends, it gets back by kernels at the mirrored alphas.
    """
    kept = alphas[alphas <= _END]
    kernels = np.concatenate([kept, 2 - kept, 2 * _END - kept])
    heights = np.exp(-(((place[:, None] - kernels) / _KERNEL) ** 2) / 2).sum(1)
    return heights / (len(alphas) * _KERNEL * math.sqrt(2 * math.pi))


def _draw_alpha(axes: "Axes", rows: Sequence[Row]) -> None:
    end = _END + 1.0
    for y, row in enumerate(rows):
        if row.status != SUCCESS:
            axes.text(1.1, y, row.status, va="center", fontsize=7, color=_GREY)
            continue
        colour = _FLAGGED if row.flag else _TYPES[row.layer_type]
        at = min(row.alpha, end - 0.5)
        axes.errorbar(
            at, y, xerr=row.sigma if row.alpha == at else None, fmt="o", color=colour, markersize=4, capsize=2
        )
        if row.alpha != at or row.flag:
            label = f"{row.alpha:.1f}" * (row.alpha != at) + f" {row.flag}" * bool(row.flag)
            axes.annotate(label, (at, y), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    _mark_range(axes)
    axes.set(xlabel="alpha, with its standard error", xlim=(1, end))


def _draw_moved(axes: "Axes", rows: Sequence[Row]) -> None:
    known = [(y, row) for y, row in enumerate(rows) if row.moved is not None]
    axes.barh([y for y, _ in known], [(row.moved or 0) / row.numel for _, row in known], color="#56B4E9", label="moved")
    masked = [(y, row.child_density) for y, row in known if row.child_density is not None]
    if masked:
        axes.plot([share for _, share in masked], [y for y, _ in masked], "|", color="black", label="child network")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, borderaxespad=0)
    axes.set(xlabel="share of the weights", xlim=(0, 1.02))


def _draw_delta(axes: "Axes", rows: Sequence[Row]) -> None:
    known = [(y, row.delta_rel) for y, row in enumerate(rows) if row.delta_rel]
    axes.plot([far for _, far in known], [y for y, _ in known], "o", color="#009E73", markersize=4)
    axes.set(xlabel="norm of the update / norm of the base", xlim=(0, None))


def _mark_range(axes: "Axes") -> None:
    """Draws the limits of the range that weightwatcher calls well trained."""
    for at in (OVER_TRAINED, UNDER_TRAINED):
        axes.axvline(at, color=_GREY, linestyle="--", linewidth=1)


def new_figure(width: float, height: float) -> "Figure":
    """Returns a figure of a size in inches, without matplotlib's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; run pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _words(name: str) -> str:
    """Returns a name so that matplotlib draws it: it takes dollars for mathematics, and hides what begins with "_"."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def check_picture(path: FilePath) -> None:
    """Raises what writing a picture to `path` would raise for want of matplotlib, or of a format of that name."""
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if _format(path) not in formats:
        raise ValueError(
            f"a picture's name must end with its format, one of {', '.join(sorted(formats))} (got '{os.fspath(path)}')"
        )


def _format(path: FilePath) -> str:
    return Path(path).suffix.removeprefix(".").lower() or "png"


def _bare(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def saved(figure: "Figure", path: FilePath | None) -> "Figure":
    """Returns a figure; if there is a path, writes it, whole or not at all. Equal figures have equal bytes."""
    if path is not None:
        from matplotlib import rc_context

        check_type("path", path, (str, os.PathLike), "a path")
        check_picture(path)
        kind, picture = _format(path), io.BytesIO()
        with rc_context({"svg.hashsalt": "spectra"}):  # without one, its names are random
            figure.savefig(picture, format=kind, dpi=130, metadata={_DATES[kind]: None} if kind in _DATES else None)
        with written(path) as file:
            file.write(picture.getvalue())
    return figure
