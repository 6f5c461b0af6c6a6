"""Runs that are kept: each has a specification, a file whose name is made of it, and is not repeated once it is there.

A file is one JSON object: the specification, what the run scored and cost, and on what it was run. It is written whole
or not at all, so that a sweep may be killed at any time and continued.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from .methods import METHODS


@dataclass(frozen=True)
class Spec:
    """What identifies a run.

    Attributes:
        task: its name, as on the command line.
        method: a key of `methods.METHODS`.
        lr: the learning rate.
        seed: of head, data order, dropout and masks.
        part: "tune", scored on the examples set aside for choosing learning rates, or "report", scored on dev.
        model: name or folder of the pretrained model.
        limit: training examples; None for all.
        settings: everything else that the result depends on, as sorted (name, value) pairs.
    """

    task: str
    method: str
    lr: float
    seed: int
    part: str
    model: str
    limit: int | None
    settings: tuple[tuple[str, float], ...]

    def file_name(self):
        """Returns the name of the run's file: readable, and with a hash of all of the specification."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:10]
        readable = f"{self.task}-{self.method}-{self.part}-lr{self.lr:.3g}-seed{self.seed}"
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", readable) + f"-{digest}.json"


def write(folder, spec, record):
    """Writes the file of a finished run."""
    path = Path(folder) / spec.file_name()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"spec": dataclasses.asdict(spec), **record}) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(folder, spec):
    """Returns the record of a finished run; None if there is none."""
    path = Path(folder) / spec.file_name()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_all(folder):
    """Returns the records of all finished runs in a folder, in the order of their files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


def compact(record):
    """Returns a record without each step's times: their medians, in seconds."""
    kept = dict(record)
    for name in ("optimizer_seconds", "step_seconds"):
        kept[name] = median(record[name])
    return kept


def score(record):
    """Returns the number that a run is judged by: the main metric after the last step."""
    return next(iter(record["curve"][-1][1].values()))


def of_search(spec):
    """Returns the specification of a run of the search: without what only comes after training, or heads alone know."""
    dropped = {"domains", "heads_on"} if METHODS[spec.method].frozen else {"domains", "heads_on", "head_epochs"}
    return replace(spec, part="tune", settings=tuple(pair for pair in spec.settings if pair[0] not in dropped))


def blank(spec):
    """Returns a specification, given as a dict, without what the runs of a sweep differ in."""
    settings = tuple((name, value) for name, value in spec["settings"])
    return Spec(**{**spec, "method": "", "lr": 0.0, "seed": 0, "part": "", "settings": settings})
