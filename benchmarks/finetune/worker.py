"""What runs in each process of a sweep."""

import functools
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from . import model, runs, transfer
from .data import load_dev, load_task
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
    domains: tuple[str, ...] = ()
    heads_on: tuple[str, ...] = ()

    def __call__(self, spec):
        """Runs it and writes its file."""
        experiment, tokenizer = _experiment(self, spec.task, spec.limit)
        part = "aside" if spec.part == "tune" else "dev"

        def elsewhere(network):
            domains = {name: _dev(name, self.data) for name in self.domains if name != spec.task}
            heads = {name: _task(self, name, spec.limit) for name in self.heads_on if name != spec.task}
            return {
                "domains": transfer.on_domains(experiment, network, tokenizer, domains),
                "heads_on": transfer.heads_on(experiment, network, tokenizer, heads, spec.seed),
            }

        afterwards = elsewhere if spec.part == "report" and (self.domains or self.heads_on) else None
        steps = experiment.steps(spec.method)
        record = experiment.run(
            spec.method, spec.seed, lambda: _advance(1 / steps), lr=spec.lr, part=part, afterwards=afterwards
        )
        about = {
            "constant_score": constant_score(experiment.task.metric, experiment.targets[part].cpu()),
            "data": {"fingerprint": experiment.task.fingerprint(), "train": len(experiment.task.train)},
            "scored": len(experiment.targets[part]),
            "versions": versions(),
            "threads": self.threads,
        }
        runs.write(self.folder, spec, {**runs.compact(record), **about})


progress = None  # in a process of the sweep: how many runs all of them have done, a shared float


def begin_process(shared=None):
    """Makes a process of the sweep leave Ctrl-C to its parent, end with it, and tell it of each step by `shared`."""
    global progress
    progress = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _advance(share):
    if progress is not None:
        with progress.get_lock():
            progress.value += share


@functools.cache
def _experiment(worker, task, limit):
    """Loads a task and the model once in each process."""
    torch.set_num_threads(worker.threads)
    number = sum(multiprocessing.current_process()._identity)
    device = model.find_device(worker.devices[number % len(worker.devices)])
    tokenizer, backbone = model.load_pretrained(worker.model or model.packaged_model(), worker.settings.pooling)
    return Experiment(tokenizer, backbone, _task(worker, task, limit), worker.settings, device), tokenizer


@functools.cache
def _task(worker, name, limit):
    return load_task(name, limit=limit, folder=worker.data, set_aside=True)


_dev = functools.cache(load_dev)
