"""Tasks: the standard library's docstrings, local TSV files, or a data set of the Hugging Face Hub.

Whatever the source, a `Task` is lists of `Example` and the list of labels; a task with real-valued labels is a
regression and has none.
"""

import gzip
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import definitions, docstrings
from .metrics import OF_GLUE

MAX_CLASSES = 50  # numeric labels with more values than this are a regression
HELD_OUT = 5  # without a dev file, every fifth input is held out
MOST_ASIDE = 500  # examples that choose a learning rate, at most
SEPARATOR = "|"  # of several labels of one example
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


@dataclass(frozen=True)
class Task:
    """What is trained and what is scored.

    Attributes:
        name: what tables and pictures call the task.
        train: training examples, in a fixed order.
        dev: examples that only ever serve for scores.
        labels: the label names in the order of the model's outputs, or None for a regression.
        metric: a key of `metrics.METRICS`. With "roc_auc", an example has several labels, separated by `SEPARATOR`.
        aside: training examples that were set aside, by which learning rates are chosen; maybe none.
    """

    name: str
    train: list[Example]
    dev: list[Example]
    labels: list[str] | None
    metric: str
    aside: list[Example]

    def targets(self, examples):
        """Returns what the model has to predict: class indices, real numbers, or a row of 0 and 1 for each example."""
        if self.labels is None:
            return [float(example.label) for example in examples]
        if self.metric == "roc_auc":
            return [[float(label in labels_of(e)) for label in self.labels] for e in examples]
        index = {label: i for i, label in enumerate(self.labels)}
        return [index[example.label] for example in examples]

    def fingerprint(self):
        """Returns a short hash of every example, by which two results can be told to rest on the same data."""
        rows = [[e.sentence1, e.sentence2, e.label] for e in [*self.train, *self.dev, *self.aside]]
        return docstrings.stable_hash(json.dumps([len(self.train), rows]))[:12]

    def counts(self):
        """Returns {label: (examples in train, examples in dev)}; one entry without a name for a regression."""
        if self.labels is None:
            return {"": (len(self.train), len(self.dev))}
        train, dev = (
            Counter(label for e in examples for label in e.label.split(SEPARATOR))
            for examples in (self.train, self.dev)
        )
        return {label: (train[label], dev[label]) for label in self.labels}


def load_task(name, dev=None, limit=None, dev_limit=None, folder=None, set_aside=False):
    """Loads a task by the name given on the command line.

    Args:
        name: "docstrings" or "docstrings-multi", each perhaps with ":" and how many paragraphs of a package at most;
            "pairs", perhaps with ":" and how many at most; "traits"; the path of a TSV file; a folder in `folder` that
            holds train.tsv.gz and dev.tsv.gz, or dev alone, which is then halved; or a Hub data set, "owner/name" or
            "owner/name:config".
        dev: path of the dev file that goes with a TSV file.
        limit: at most this many examples in train, drawn by a fixed seed.
        dev_limit: the same for dev.
        folder: where tasks are.
        set_aside: takes a fifth of the training examples, at most `MOST_ASIDE`, out of train first.

    Returns:
        A `Task`.

    Raises:
        UserError: the source is missing or malformed.
    """
    train, dev_examples = _read(name, dev, folder)
    title = "/".join(Path(name).parts[-2:]) if is_local(name) else name
    several = any(SEPARATOR in e.label for e in train)
    labels = sorted({x for e in train for x in labels_of(e)}) if several else infer_labels(train)
    _check_dev_labels(title, {x for e in dev_examples for x in (labels_of(e) if several else [e.label])}, labels)
    known = OF_GLUE.get(re.split("[/:]", name)[-1])
    metric = "roc_auc" if several else known or ("correlation" if labels is None else "accuracy")
    aside = _draw(train, min(MOST_ASIDE, len(train) // 5), seed=1) if set_aside else []
    kept = set(map(id, train)) - set(map(id, aside))
    train = _draw([example for example in train if id(example) in kept], limit)
    return Task(title, train, _draw(dev_examples, dev_limit), labels, metric, aside)


def load_dev(name, folder=None):
    """Loads a task of which only the dev set is used, as both train and dev; see `load_task`."""
    path = Path(folder or "") / name / "dev.tsv.gz"
    if folder is None or not path.is_file():
        return load_task(name, folder=folder)
    examples = read_tsv(path)
    return Task(name, examples, examples, infer_labels(examples), OF_GLUE.get(path.parent.name, "accuracy"), [])


def labels_of(example):
    """Returns the labels of an example that may have several, or none."""
    return list(filter(None, example.label.split(SEPARATOR)))


def _check_dev_labels(title, found, labels):
    strange = sorted(x for x in found if not (x in labels if labels else _is_number(x)))
    if strange:
        lacking = "train lacks" if labels else "are no finite numbers"
        raise UserError(f"{title}: dev holds labels that {lacking} ({', '.join(strange[:5])}); correct train or dev")


def _read(name, dev, folder):
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


def _draw(examples, limit, seed=0):
    """Returns `limit` of the examples in their old order, always the same ones."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


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


def infer_labels(examples):
    """Returns the sorted class names of a classification, or None if the labels make it a regression.

    Labels that are all numbers and not all integers, or that take more than `MAX_CLASSES` values, are a regression.
    """
    labels = {example.label for example in examples}
    if not all(map(_is_number, labels)):
        return sorted(labels)
    if len(labels) > MAX_CLASSES or not all(float(label).is_integer() for label in labels):
        return None
    return sorted(labels, key=float)


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
