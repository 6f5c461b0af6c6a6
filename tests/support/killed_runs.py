"""Runs processes that step and save until they are killed, each going on from what the one before it left behind.

    python killed_runs.py BACKEND FOLDER

They save the child network, a delta and a checkpoint. Prints how many runs left a checkpoint that is further on, and
how many left an unfinished file.
"""

import copy
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from helpers import same_bits
from processes import wait_until
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork

KILLS = 100
FILES = ("child", "delta", "run.pt")


def child_of(model):
    return ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")


def begin(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 64))
    return model, ChildAdamW(model.parameters(), lr=1e-3, child=child_of(model), backend=backend)


def step(model, optimizer, t):
    generator = torch.Generator().manual_seed(t)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def save(path, model, optimizer, t):
    """Writes beside the file and renames, so that it is always a whole one."""
    unfinished = path.with_suffix(".unfinished")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "t": t}, unfinished)
    os.replace(unfinished, path)


def resume(path, model, optimizer):
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["t"]


def train_until_killed(folder, backend):
    base, _ = begin(backend)
    model, optimizer = begin(backend)
    child = ChildNetwork.load(folder / "child", model) if (folder / "child").exists() else child_of(model)
    t = resume(folder / "run.pt", model, optimizer)
    while True:
        step(model, optimizer, t)
        t += 1
        child.save(folder / "child")
        child.save_delta(folder / "delta", model, base)
        save(folder / "run.pt", model, optimizer, t)


class Uninterrupted:
    """The run that nobody interrupts: its states at the step that was asked for last, and at the next one."""

    def __init__(self, backend):
        self.model, self.optimizer = begin(backend)
        self.t, self.states = 0, {0: self.copied()}

    def copied(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])

    def at(self, t):
        while self.t <= t:
            step(self.model, self.optimizer, self.t)
            self.t += 1
            self.states[self.t] = self.copied()
        self.states = {time: state for time, state in self.states.items() if time >= t}
        return self.states[t]


def check_files(folder, backend, whole):
    """Asserts that what is there is whole: the child network, and the delta of the checkpoint's step or the next.

    Returns:
        Whether a file was left unfinished.
    """
    base, _ = begin(backend)
    if (folder / "child").exists():
        assert ChildNetwork.load(folder / "child", base).fingerprint == child_of(base).fingerprint
    if (folder / "delta").exists():
        ChildNetwork.apply_delta(folder / "delta", base)
        state = base.state_dict()
        assert any(all(same_bits(state[name], now[name]) for name in state) for now, _ in whole.states.values())
    others = {path.name for path in folder.iterdir()} - {*FILES, "run.unfinished"}
    assert len(others) <= 1
    assert all(name.startswith(".childtune_fast-") for name in others)
    return bool(others)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def time_of(path):
    return path.stat().st_mtime_ns if path.exists() else None


def main(backend, folder):
    folder, randomness, whole = Path(folder), random.Random(0), Uninterrupted(backend)
    path, done = folder / "run.pt", 0
    progressed = amid_writing = 0
    for _ in range(KILLS):
        awaited = folder / randomness.choice(FILES)
        before = time_of(awaited)
        pid = os.fork()
        if pid == 0:
            train_until_killed(folder, backend)
        if randomness.random() < 0.8:  # else it may die while it resumes
            wait_until(lambda awaited=awaited, before=before: time_of(awaited) != before, every=0.001)
        time.sleep(randomness.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself with status {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        amid_writing += path.with_suffix(".unfinished").exists()
        saved = torch.load(path, weights_only=True) if path.exists() else {"t": 0}
        progressed += saved["t"] > done
        done = saved["t"]
        model, optimizer = whole.at(done)
        if done:
            assert_same(saved["model"], model)
            assert_same(saved["optimizer"], optimizer)
        amid_writing += check_files(folder, backend, whole)
        path.with_suffix(".unfinished").unlink(missing_ok=True)
    child_of(begin(backend)[0]).save(folder / "child")
    assert {path.name for path in folder.iterdir()} == set(FILES)
    print(progressed, amid_writing)


if __name__ == "__main__":
    main(*sys.argv[1:])
