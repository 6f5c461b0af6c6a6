"""The examples of `childtune fisher`: read by datasets, checked, and with labels as numbers."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_READERS = {".tsv": "csv", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Classes(NamedTuple):
    """How labels are numbered.

    Attributes:
        numbers: {label: number of its class}.
        total: number of classes, of which the data may lack some.
    """

    numbers: dict[Any, int]
    total: int


def read(options: argparse.Namespace) -> Any:
    """Returns the columns that the command line asks for, of all rows, as a datasets.Dataset.

    Raises:
        ValueError: the data cannot be read, a column is not there or asked for twice, or a row lacks a text or a label.
        ImportError: datasets is not installed.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its own lines beside the one that tells what is wrong
    reader = _reader(options.data)
    if reader is not None and (options.config or options.split):
        raise ValueError(f"--config and --split are of data on the Hub (got '{options.data}', a file)")
    try:
        if reader is None:
            rows = datasets.load_dataset(options.data, options.config, split=options.split or "train")
        else:
            rows = datasets.load_dataset(reader[0], data_files=options.data, split="train", **reader[1])
    except Exception as error:  # its readers raise their own
        cause = error.__cause__ or error
        raise ValueError(f"'{options.data}' cannot be read as a data set: {cause}") from error
    wanted = [*options.text, *([] if options.task == "causal-lm" else [options.label])]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(f"'{options.data}' must have the columns asked for (no '{missing[0]}' in {rows.column_names})")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"each column can be asked for once (got {', '.join(wanted)})")
    rows = rows.select_columns(wanted)
    for column in options.text:
        _check(column, rows[column], str, "a text")
    return rows


def _reader(data: str) -> tuple[str, dict[str, Any]] | None:
    """Returns the reader of a file by its name, and its options; None for a name on the Hub."""
    end = Path(data.lower().removesuffix(".gz")).suffix
    if end not in _READERS:
        return None
    texts = {"keep_default_na": False} if _READERS[end] == "csv" else {}  # "NA" is a text, too
    return _READERS[end], {**texts, **({"delimiter": "\t", "quoting": 3} if end == ".tsv" else {})}


def _check(column: str, values: Sequence[Any], kind: type | tuple[type, ...], noun: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"column '{column}' must have {noun} in every row (got {value!r:.40} in row {row + 1})")


def numbers(rows: Any, column: str) -> list[float]:
    """Returns the labels of a regression; raises ValueError if one is no finite number."""
    _check(column, rows[column], (int, float), "a number")
    return [float(value) for value in rows[column]]


def classes(rows: Any, column: str, config: Any) -> Classes:
    """Returns how the labels of a classification are numbered.

    That is as the data set does, if it names its classes; else as the model's head does, if it has one that knows all
    labels; else whole numbers from 0 on stay, and other labels are numbered in their order.

    Args:
        rows: of `read`.
        column: name of the column of labels.
        config: the model's configuration.

    Raises:
        ValueError: a label is missing or negative, labels are fractions, or all are one.
    """
    _check(column, rows[column], (str, int, float), "a label")
    names = getattr(rows.features[column], "names", None)
    found = sorted(set(rows[column]), key=lambda label: (isinstance(label, str), label))
    if any(isinstance(label, float) and label != int(label) for label in found):
        raise ValueError(f"labels of classes must be texts or whole numbers (got {found[:5]}); say --task regression")
    if not isinstance(found[0], str) and found[0] < 0:
        raise ValueError(f"column '{column}' must have a class in every row (got {found[0]}, which stands for none)")
    if names is None and len(found) < 2:
        raise ValueError(f"column '{column}' must have two classes or more (got {found[0]!r} alone)")
    whole = not isinstance(found[-1], str)
    if names is not None:
        return Classes({label: label for label in found}, len(names))
    if (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        known: Mapping[Any, int] = range(config.num_labels) if whole else config.label2id  # type: ignore[assignment]
        if all(label in known for label in found):
            return Classes({label: int(label) if whole else known[label] for label in found}, config.num_labels)
    if whole and found[-1] < len(found):
        return Classes({label: int(label) for label in found}, len(found))
    return Classes({label: index for index, label in enumerate(found)}, len(found))
