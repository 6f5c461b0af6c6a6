"""`Spectra`, a row for each layer of a model: as a table, a file and a picture."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import FilePath, check_type
from ..whole_file import written
from .pictures import by_layer
from .row import SUCCESS, UNDER_TRAINED, Row
from .text import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_KIND = "spectra of childtune_fast"
_MEANS = ("alpha", "log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm", "stable_rank")
_NAMED = 5  # parameters that an error names


class Spectra:
    """The spectra of a model's layers, as `analyze` returns them; printed, they are a table.

    Attributes:
        rows: a Row for each layer, in the model's order.
        skipped: {name: reason} of the parameters with two dimensions or more that are left out.
        outside: {masked parameter: number of weights outside of the child network that are not the base's}; None
            unless `analyze` was given both.
    """

    def __init__(self, rows: Sequence[Row], skipped: Mapping[str, str], outside: Mapping[str, int] | None) -> None:
        """Holds what `analyze` found."""
        self.rows = list(rows)
        self.skipped = dict(skipped)
        self.outside = None if outside is None else dict(outside)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def summary(self) -> dict[str, float]:
        """Returns numbers on the whole model; layers without a fit are in none of them but the first.

        They are: `layers`, their number; `fitted`, that of layers with a fit; the means of weightwatcher's summary,
        under the columns' names; `alpha_median`, `alpha_min` and `alpha_max`; `above_6`, the number of layers with an
        alpha above 6; and `flagged`, that of the layers with a flag. NaN stands where there is nothing to average.
        """
        fitted = [row for row in self.rows if row.status == SUCCESS]
        alphas = [row.alpha for row in fitted] or [math.nan]
        means = {name: statistics.fmean([getattr(row, name) for row in fitted] or [math.nan]) for name in _MEANS}
        return {
            "layers": len(self.rows),
            "fitted": len(fitted),
            **means,
            "alpha_median": statistics.median(alphas),
            "alpha_min": min(alphas),
            "alpha_max": max(alphas),
            "above_6": sum(row.alpha > UNDER_TRAINED for row in fitted),
            "flagged": sum(bool(row.flag) for row in fitted),
        }

    def __str__(self) -> str:
        return f"{as_text(self.rows)}\n{self._in_words()}" if self.rows else self._in_words()

    def _in_words(self) -> str:
        found = self.summary()
        parts = [f"{found['layers']} layer{'s' * (found['layers'] != 1)}"]
        if found["fitted"]:
            parts += [
                f"alpha: mean {found['alpha']:.3f}, median {found['alpha_median']:.3f}, "
                f"{found['alpha_min']:.2f} to {found['alpha_max']:.2f}, {found['above_6']} above 6",
            ]
        if found["flagged"]:
            parts.append(f"{found['flagged']} without a sign of training")
        if missing := sum(row.moved is None for row in self.rows) * any(row.moved is not None for row in self.rows):
            parts.append(f"{missing} not in the base")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return "; ".join(parts)

    def check(self) -> None:
        """Does nothing if no weight outside of the child network has moved, in any masked parameter, by its bits.

        Raises:
            ValueError: one has, or `analyze` was not given both `base` and `child`.
        """
        if self.outside is None:
            raise ValueError("Spectra.check: analyze must have been given base= and child= (got at most one of them)")
        moved = [f"'{name}': {count:,}" for name, count in self.outside.items() if count]
        if moved:
            named = ", ".join(moved[:_NAMED]) + (f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else "")
            raise ValueError(
                f"Spectra.check: outside of the child network no weight may differ from the base's (got {named}); "
                "likely causes are decay='all', an average of the weights, another base, or another child network"
            )

    def to_json(self, path: FilePath) -> None:
        """Writes all columns to a file, the whole file or, on an error, nothing.

        NaN and infinity become null; what is None, such as `moved` without a base, is left out.

        Args:
            path: the file to write; an existing one is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        check_type("Spectra.to_json: path", path, (str, os.PathLike), "a path")
        with written(path) as file:
            file.write((json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n").encode())

    def as_dict(self) -> dict[str, Any]:
        """Returns what `to_json` writes, as a dict that JSON can hold."""
        return {"kind": _KIND, "rows": list(map(_as_json, self.rows)), "skipped": self.skipped, "outside": self.outside}

    @classmethod
    def from_json(cls, path: FilePath) -> "Spectra":
        """Returns what `to_json` wrote.

        Raises:
            ValueError: the file is of another kind.
            OSError: the file cannot be read.
        """
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            if found["kind"] != _KIND:
                raise ValueError(found["kind"])
            return cls(list(map(_from_json, found["rows"])), found["skipped"], found["outside"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{os.fspath(path)}' must be a file that Spectra.to_json wrote (got another one: {error!r})"
            ) from None

    def to_pandas(self) -> "DataFrame":
        """Returns a pandas.DataFrame with a row for each layer; columns that no row has are left out.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Spectra.to_pandas needs pandas; run pip install pandas") from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.rows]).dropna(axis="columns", how="all")

    def plot(self, path: FilePath | None = None) -> "Figure":
        """Draws alpha with its standard error by layer; with a base, also how many weights moved, and how far.

        Args:
            path: picture to write, of the format that its suffix names; None writes none (default: None).

        Returns:
            The matplotlib Figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no layer to draw, or the path names no format.
            OSError: the file cannot be written.
        """
        return by_layer(self.rows, path)


def _as_json(row: Row) -> dict[str, Any]:
    """Returns a row's fields but for those that are None; NaN and infinity, which JSON lacks, become None."""
    fields = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in fields.items()}


def _from_json(fields: Mapping[str, Any]) -> Row:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in fields.items()}
    return Row(**values)
