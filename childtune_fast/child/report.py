"""The report on a child network: its density in each tensor and each kind of module, as a table and as a picture."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..ops.packed_mask import PackedMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LAYER = re.compile(r"(?P<layer>(?:.*?\.)?\d+)\.(?P<kind>.+)\.[^.]+")  # the first number in a name is that of the layer


class Row(NamedTuple):
    """One line of a `Summary`: one masked parameter, or all of one kind of module, of one layer, or in all.

    Attributes:
        name: name of the parameter, of the kind of module or of the layer, or "all".
        layer: block that the parameter is in, such as "bert.encoder.layer.3"; "" for a parameter outside of blocks and
            for several parameters.
        kind: name within its block of the module that the parameter is in, such as "attention.self.query"; for several
            parameters the same as `name`.
        count: number of weights that are in the child network.
        numel: number of all weights.
    """

    name: str
    layer: str
    kind: str
    count: int  # type: ignore[assignment]  # a field, instead of tuple.count
    numel: int

    @property
    def density(self) -> float:
        """The share of the weights that are in the child network, from 0 to 1; 0 if there are no weights."""
        return self.count / self.numel if self.numel else 0.0


class Summary(NamedTuple):
    """The density of a child network; `str` and `print` show it as a table with a line for each kind of module.

    Attributes:
        tensors: a Row for each masked parameter, in the child network's order.
        kinds: a Row for each kind of module, in the order of their first parameters.
    """

    tensors: list[Row]
    kinds: list[Row]

    @property
    def layers(self) -> list[Row]:
        """A Row for each layer, called by its name; parameters outside of layers have that of the name ""."""
        return _rows_of([(row.layer, row) for row in self.tensors])

    @property
    def total(self) -> Row:
        """The Row of all masked parameters, of the name "all"."""
        return _merged("all", self.tensors)

    def __str__(self) -> str:
        total = self.total
        width = max(len(row.name) for row in [*self.kinds, total])
        lines = [f"{'kind of module':{width}}  {'kept':>13}  {'weights':>13}  density"]
        lines += [f"{r.name:{width}}  {r.count:>13,}  {r.numel:>13,}  {r.density:7.2%}" for r in [*self.kinds, total]]
        return "\n".join(lines)


def summarize(packed: Mapping[str, PackedMask]) -> Summary:
    """Returns the summary of a child network with the masks `packed`, {parameter name: mask}."""
    rows = []
    for name, mask in packed.items():
        parts = _LAYER.fullmatch(name)
        layer, kind = (parts["layer"], parts["kind"]) if parts else ("", name.rpartition(".")[0] or name)
        rows.append(Row(name, layer, kind, mask.count, mask.numel))
    return Summary(rows, _rows_of([(row.kind, row) for row in rows]))


def _rows_of(named: list[tuple[str, Row]]) -> list[Row]:
    """Returns a Row for each name: of all rows that have it, in the order of the first ones."""
    names = dict.fromkeys(name for name, _ in named)
    return [_merged(name, (row for other, row in named if other == name)) for name in names]


def _merged(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return Row(name, "", name, sum(row.count for row in rows), sum(row.numel for row in rows))


def plot_density(summary: Summary, ax: "Axes | None" = None) -> "Axes":
    """Draws the density by layer and kind of module on `ax`, on new Axes if it is None, and returns the Axes.

    Raises:
        ImportError: `ax` is None, and matplotlib is not installed.
    """
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("ChildNetwork.plot needs matplotlib; run pip install matplotlib") from error
        ax = pyplot.figure(layout="constrained").add_subplot()
    layers = list(dict.fromkeys(row.layer for row in summary.tensors))
    kinds = [row.name for row in summary.kinds]
    counts, sizes = np.zeros((2, len(kinds), len(layers)))
    for row in summary.tensors:
        place = kinds.index(row.kind), layers.index(row.layer)
        counts[place] += row.count
        sizes[place] += row.numel
    density = np.divide(counts, sizes, out=np.full_like(counts, np.nan), where=sizes > 0)
    image = ax.imshow(density, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
    ax.set_xticks(range(len(layers)), [layer or "outside" for layer in layers], rotation=90)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_title("density of the child network")
    ax.figure.colorbar(image, ax=ax, label="share of weights kept")
    return ax
