"""Tasks: the standard library's docstrings, local TSV files, or a data set of the Hugging Face Hub.

Whatever the source, a `Task` is lists of `Example` and the list of labels; a task with real-valued labels is a
regression and has none.
"""

import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import docstrings
from .metrics import OF_GLUE
from .sources import SEPARATOR, Example, UserError, is_local, read, read_tsv

MAX_CLASSES = 50  # numeric labels with more values than this are a regression
MOST_ASIDE = 500  # examples that choose a learning rate, at most


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
    train, dev_examples = read(name, dev, folder)
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


def _draw(examples, limit, seed=0):
    """Returns `limit` of the examples in their old order, always the same ones."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


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
