"""Where the examples of a task come from: the standard library, local TSV files, or the Hugging Face Hub."""

import gzip
from dataclasses import dataclass
from pathlib import Path

from . import definitions, docstrings

SEPARATOR = "|"  # of several labels of one example
HELD_OUT = 5  # without a dev file, every fifth input is held out
FEWEST_PAIRS = 8  # of which half change places
NO_SOURCES = "this Python ships no standard library sources; give a TSV file with --task"
CAPPED = dict.fromkeys(["docstrings", "docstrings-multi"], "paragraphs of a package") | {"pairs": "training pairs"}


class UserError(Exception):
    """Something that the person at the keyboard can mend; the message is one sentence that says how."""


@dataclass(frozen=True)
class Example:
    """One input, a sentence or a pair, and its label as written in the source."""

    sentence1: str
    sentence2: str | None
    label: str


def read(name, dev, folder):
    """Returns the examples of train and of dev; see `data.load_task`."""
    kind, _, cap = name.partition(":")
    if kind in CAPPED:
        if cap and not (cap.isdecimal() and int(cap)):
            raise UserError(f"{name}: after the colon stands how many {CAPPED[kind]} at most; give a number")
        cap = int(cap) if cap else None
        return _read_pairs(cap) if kind == "pairs" else _read_docstrings(kind, cap)
    if name == "traits":
        return _read_traits()
    if folder is not None and (Path(folder) / name).is_dir():
        return _read_folder(Path(folder) / name)
    return _read_tsv_pair(name, dev) if is_local(name) else _read_hub(name)


def _read_folder(folder):
    """Reads train and dev; of a task without train, dev is halved, with equal first sentences in one half."""
    dev = read_tsv(folder / "dev.tsv.gz")
    if any(folder.glob("train*")):
        return read_tsv(folder / "train.tsv.gz"), dev
    halves = ([], [])
    for example in dev:
        halves[int(docstrings.stable_hash(example.sentence1), 16) % 2].append(example)
    if not all(halves):
        raise UserError(f"{folder}: dev.tsv.gz has too few first sentences to be halved; add train.tsv.gz")
    return halves


def is_local(name):
    """Tells whether a task is a TSV file: an existing path, or one that should exist."""
    return name.endswith((".tsv", ".tsv.gz")) or Path(name).exists()


def _read_traits():
    parts = definitions.build_traits()
    if not all(parts):
        raise UserError(NO_SOURCES)
    return tuple([Example(text, None, SEPARATOR.join(sorted(own))) for text, own in part] for part in parts)


def _read_pairs(cap):
    if cap is not None and cap < FEWEST_PAIRS:
        raise UserError(f"pairs:{cap}: that is too few; give at least {FEWEST_PAIRS}")
    parts = definitions.build_pairs(train_cap=cap)
    if not all(parts):
        raise UserError(NO_SOURCES)
    return tuple([Example(*one) for one in part] for part in parts)


def _read_docstrings(kind, cap):
    parts = docstrings.build(train_cap=cap or docstrings.TRAIN_CAP)
    if len({p.package for p in parts[0]}) < 2:
        raise UserError(NO_SOURCES)
    if kind == "docstrings":
        return tuple([Example(p.text, None, p.package) for p in part] for part in parts)
    return tuple(
        [Example(p.text, q.text, SEPARATOR.join(sorted({p.package, q.package}))) for p, q in docstrings.in_pairs(part)]
        for part in parts
    )


def _read_tsv_pair(path, dev):
    examples = read_tsv(path)
    if dev is not None:
        return examples, read_tsv(dev)
    sides = ([], [])
    for example in examples:
        key = docstrings.stable_hash(example.sentence1, example.sentence2 or "")
        sides[int(key, 16) % HELD_OUT == 0].append(example)
    if not all(sides):
        raise UserError(f"{path}: too few rows ({len(examples)}) to hold some out; give a dev file with --dev")
    return sides


def read_tsv(path):
    """Reads a UTF-8 file of tab-separated fields without quoting, gzipped if its name ends in .gz.

    Args:
        path: file whose first line names the columns: `sentence1`, `label` and, for pairs, `sentence2`.

    Returns:
        A list of `Example`.

    Raises:
        UserError: no such file, a missing column, or a row with too few or too many fields.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().removesuffix("\n").replace("\r\n", "\n").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give an existing UTF-8 TSV file") from error
    columns, rows = lines[0].split("\t"), []
    if not {"sentence1", "label"} <= set(columns):
        raise UserError(f"{path}: the first line must name columns sentence1 and label, but is {lines[0][:80]!r}")
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise UserError(f"{path}: line {number} has {len(fields)} fields, but the header names {len(columns)}")
        row = dict(zip(columns, fields, strict=True))
        rows.append(Example(row["sentence1"], row.get("sentence2"), row["label"]))
    return rows


def _read_hub(name):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} is no local file, and Hub data sets need: pip install datasets") from error
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the library raises a dozen unrelated types for a wrong name or a missing network
        cause = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: the Hub data set could not be loaded ({type(error).__name__}: {cause}); "
            "check name, config and network, or give a local TSV file"
        ) from error
    dev = next((split for split in ("validation", "dev", "validation_matched", "test") if split in splits), None)
    if "train" not in splits or dev is None:
        raise UserError(f"{name}: needs a train and a validation split, but has {', '.join(splits)}")
    return hub_examples(name, splits["train"]), hub_examples(name, splits[dev])


def hub_examples(name, split):
    """Converts a split of a Hub data set: its first one or two columns of strings, and its column `label`.

    Args:
        name: name for the error message.
        split: a `datasets.Dataset`, or any sequence of dicts.

    Returns:
        A list of `Example`.
    """
    texts = [column for column, value in split[0].items() if isinstance(value, str) and column != "label"][:2]
    if not texts or "label" not in split[0]:
        raise UserError(f"{name}: needs a column of text and a column label, but has {', '.join(split[0])}")
    return [Example(r[texts[0]], r[texts[1]] if len(texts) > 1 else None, str(r["label"])) for r in split]
