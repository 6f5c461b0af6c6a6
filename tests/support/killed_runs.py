"""Runs processes that step and save until they are killed, each going on from what the one before it left behind.

    python killed_runs.py BACKEND FOLDER

Prints how many checkpoints the runs left, and how many were killed while they wrote one.
"""

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

KILLS = 60


def begin(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 64))
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")
    return model, ChildAdamW(model.parameters(), lr=1e-3, child=child, backend=backend)


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


def train_until_killed(path, backend):
    model, optimizer = begin(backend)
    t = resume(path, model, optimizer)
    while True:
        step(model, optimizer, t)
        t += 1
        save(path, model, optimizer, t)


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
    path, randomness = Path(folder) / "run.pt", random.Random(0)
    model, optimizer = begin(backend)  # the run that nobody interrupts
    done, amid_writing, progressed = 0, 0, 0
    for _ in range(KILLS):
        before = time_of(path)
        pid = os.fork()
        if pid == 0:
            train_until_killed(path, backend)
        if randomness.random() < 0.7:  # else it may die while it resumes
            wait_until(lambda before=before: time_of(path) != before)
        time.sleep(randomness.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself with status {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        amid_writing += path.with_suffix(".unfinished").exists()
        path.with_suffix(".unfinished").unlink(missing_ok=True)
        if not path.exists():
            continue
        saved = torch.load(path, weights_only=True)
        progressed += saved["t"] > done
        while done < saved["t"]:
            step(model, optimizer, done)
            done += 1
        assert_same(saved["model"], model.state_dict())
        assert_same(saved["optimizer"], optimizer.state_dict())
    print(progressed, amid_writing)


if __name__ == "__main__":
    main(*sys.argv[1:])
