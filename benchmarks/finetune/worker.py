"""What runs in each process of a sweep."""

import functools
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch

from . import model, runs
from .data import load_task
from .methods import Settings
from .metrics import constant_score
from .report import versions
from .train import Experiment


@dataclass(frozen=True)
class Worker:
    """Runs a specification, in a process that keeps data and model for the next one."""

    settings: Settings
    model: str | None
    data: Path | None
    folder: Path
    devices: tuple[str, ...]
    threads: int

    def __call__(self, spec):
        """Runs it and writes its file."""
        experiment = _experiment(self, spec.task, spec.limit)
        part = "aside" if spec.part == "tune" else "dev"
        record = experiment.run(spec.method, spec.seed, lr=spec.lr, part=part)
        about = {
            "constant_score": constant_score(experiment.task.metric, experiment.targets[part].cpu()),
            "data": {"fingerprint": experiment.task.fingerprint(), "train": len(experiment.task.train)},
            "scored": len(experiment.targets[part]),
            "versions": versions(),
        }
        runs.write(self.folder, spec, {**runs.compact(record), **about})


@functools.cache
def _experiment(worker, task, limit):
    """Loads a task and the model once in each process."""
    torch.set_num_threads(worker.threads)
    number = sum(multiprocessing.current_process()._identity)
    device = model.find_device(worker.devices[number % len(worker.devices)])
    tokenizer, backbone = model.load_pretrained(worker.model or model.packaged_model())
    loaded = load_task(task, limit=limit, folder=worker.data, set_aside=True)
    return Experiment(tokenizer, backbone, loaded, worker.settings, device)
