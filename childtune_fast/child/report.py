"""What a child network looks like: its density per tensor and per kind of module, as a table and as a picture."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..ops.packed_mask import PackedMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LAYER = re.compile(r"(?P<layer>(?:.*?\.)?\d+)\.(?P<kind>.+)\.[^.]+")  # the first number in a name is the layer's


class Row(NamedTuple):
    """One tensor, or all tensors of one kind.

    Attributes:
        name: of the parameter, or of the kind.
        layer: the block that it is in, such as "bert.encoder.layer.3"; empty outside of blocks and for a kind.
        kind: the module that it is in, within its block, such as "attention.self.query".
        count: weights in the child network.
        numel: weights.
    """

    name: str
    layer: str
    kind: str
    count: int  # type: ignore[assignment]  # a field, in the place of tuple.count
    numel: int

    @property
    def density(self) -> float:
        """The share of weights in the child network; 0 for an empty tensor."""
        return self.count / self.numel if self.numel else 0.0


class Summary(NamedTuple):
    """Density of a child network. As a string, a table by kind of module.

    Attributes:
        tensors: a row for each masked parameter, in the child network's order.
        kinds: a row for each kind of module.
    """

    tensors: list[Row]
    kinds: list[Row]

    def __str__(self) -> str:
        total = _merged("all", self.tensors)
        width = max(len(row.name) for row in [*self.kinds, total])
        lines = [f"{'kind of module':{width}}  {'kept':>13}  {'weights':>13}  density"]
        lines += [f"{r.name:{width}}  {r.count:>13,}  {r.numel:>13,}  {r.density:7.2%}" for r in [*self.kinds, total]]
        return "\n".join(lines)


def summarize(packed: Mapping[str, PackedMask]) -> Summary:
    """Returns the rows of all tensors, and those of all kinds."""
    rows = []
    for name, mask in packed.items():
        parts = _LAYER.fullmatch(name)
        layer, kind = (parts["layer"], parts["kind"]) if parts else ("", name.rpartition(".")[0] or name)
        rows.append(Row(name, layer, kind, mask.count, mask.numel))
    kinds = dict.fromkeys(row.kind for row in rows)
    return Summary(rows, [_merged(kind, (row for row in rows if row.kind == kind)) for kind in kinds])


def _merged(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return Row(name, "", name, sum(row.count for row in rows), sum(row.numel for row in rows))


def plot_density(summary: Summary, ax: "Axes | None" = None) -> "Axes":
    """Draws density by layer and kind of module; see `ChildNetwork.plot`."""
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
