"""`Comparison`: what became of the layers of a model."""

import dataclasses
from collections.abc import Iterator, Sequence

from ..arguments import check_type
from .names import matched
from .row import Row
from .table import Spectra
from .text import aligned


@dataclasses.dataclass(frozen=True)
class Change:
    """One layer in two models.

    Attributes:
        longname: its name in the second.
        before: its row in the first.
        after: its row in the second.
    """

    longname: str
    before: Row
    after: Row

    @property
    def alpha(self) -> float:
        """By how much alpha has grown."""
        return self.after.alpha - self.before.alpha


class Comparison:
    """The layers that two models share, as `compare` returns them; printed, they are a table.

    Attributes:
        rows: a Change for each layer, in the second model's order.
        alone: names of the layers that only one of the models has.
    """

    def __init__(self, rows: Sequence[Change], alone: Sequence[str]) -> None:
        """Holds what `compare` found."""
        self.rows, self.alone = list(rows), list(alone)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.rows)

    def __str__(self) -> str:
        head = ["longname", "alpha before", "after", "change", "sigma", "stable_rank before", "after"]
        cells = [
            [
                row.longname,
                *(f"{value:.3f}" for value in (row.before.alpha, row.after.alpha)),
                f"{row.alpha:+.3f}",
                *(f"{value:.3f}" for value in (row.after.sigma, row.before.stable_rank, row.after.stable_rank)),
            ]
            for row in self.rows
        ]
        alone = [f"in one of them only: {', '.join(self.alone)}"] if self.alone else []
        return "\n".join([*aligned([head, *cells]), *alone])


def compare(before: Spectra, after: Spectra) -> Comparison:
    """Returns what became of the layers of a model.

    Args:
        before: spectra of the first model.
        after: spectra of the second, which may have another prefix in its names, such as "bert.".

    Raises:
        TypeError: an argument is no Spectra.
    """
    for what, value in (("before", before), ("after", after)):
        check_type(f"compare: {what}", value, Spectra, "a Spectra")
    first, second = ({row.longname: row for row in spectra} for spectra in (before, after))
    names = matched(second, first)
    alone = [*(name for name in first if name not in names.values()), *(name for name in second if name not in names)]
    return Comparison([Change(name, first[names[name]], row) for name, row in second.items() if name in names], alone)
