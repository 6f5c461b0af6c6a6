"""Spectra as printed: the columns of the table, and how they are laid out."""

import dataclasses
from collections.abc import Callable, Sequence

from .row import SUCCESS, Row


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of the printed table: its title, the text of a row's cell, and whether a row has something to show."""

    title: str
    show: Callable[[Row], str]
    has: Callable[[Row], bool] = lambda row: True


def _of(name: str, form: str) -> _Column:
    """Returns the column of a field that may be None or NaN."""

    def has(row: Row) -> bool:
        value = getattr(row, name)
        return value is not None and value == value

    return _Column(name, lambda row: format(getattr(row, name), form) if has(row) else "-", has)


_COLUMNS = [
    _Column("longname", lambda row: row.longname),
    _Column("layer_type", lambda row: row.layer_type),
    _Column("N", lambda row: str(row.N)),
    _Column("M", lambda row: str(row.M)),
    _Column("rf", lambda row: str(row.rf), lambda row: row.rf > 1),
    _of("alpha", ".3f"),
    _of("sigma", ".3f"),
    _of("D", ".3f"),
    _Column("num_pl_spikes", lambda row: str(row.num_pl_spikes)),
    _of("log_norm", ".3f"),
    _of("log_spectral_norm", ".3f"),
    _of("stable_rank", ".2f"),
    _of("rand_spikes", "d"),
    _of("moved", ",d"),
    _of("child_density", ".2%"),
    _of("delta_rel", ".2e"),
    _of("delta_stable_rank", ".2f"),
    _Column("flag", lambda row: row.flag, lambda row: bool(row.flag)),
    _Column("status", lambda row: row.status, lambda row: row.status != SUCCESS),
]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table with a head: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [False, *(all(map(_is_number, column[1:])) for column in list(zip(*rows, strict=True))[1:])]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    return cell in ("", "-", "nan") or cell.lstrip("+-")[:1].isdigit()


def as_text(rows: Sequence[Row]) -> str:
    """Returns the table of some layers, with the columns in which one of them has something to show."""
    shown = [column for column in _COLUMNS if any(column.has(row) for row in rows)]
    return "\n".join(aligned([[column.title for column in shown], *([c.show(row) for c in shown] for row in rows)]))
