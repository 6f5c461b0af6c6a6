"""One thread steps, another takes away gradients, lists and state while it does."""

import contextlib
import sys
import threading

import torch
from native_cases import LISTS, group_of
from odd_tensors import Buffers

from childtune_fast import ChildAdamW
from childtune_fast.native import load

ROUNDS = 6


def thread_case(rng, oracle):
    """The two threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        rng.choice((optimizer, optimizer, compiled))(rng, oracle)
    finally:
        sys.setswitchinterval(interval)


def beside(disturb, call):
    """Runs `call` while another thread runs `disturb` over and over."""
    done = threading.Event()

    def work():
        while not done.is_set():
            with contextlib.suppress(Exception):
                disturb()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()


def optimizer(rng, oracle):
    size = rng.choice((40, 4097, 40_000, 100_000))
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(3)]
    backend = rng.choice(("native", "native", "torch"))
    made = ChildAdamW(params, reserve_p=rng.choice((1.0, 0.3)), seed=0, backend=backend)
    # Kept alive, for torch itself crashes where one thread reads a `.grad` that another one sets to None.
    grads, others = ([torch.ones(size) for _ in params] for _ in range(2))
    kind = rng.randrange(5)

    def disturb():
        if kind == 0:
            made.zero_grad()
        elif kind == 1:
            for p, grad in zip(params, others, strict=True):
                p.grad = None
                p.grad = grad
        elif kind == 2:
            made.param_groups[0]["params"].clear()
            made.param_groups[0]["params"].extend(params)
        elif kind == 3:
            made.state.clear()
        else:
            made.param_groups[0]["lr"] = 0.5
            made.state_dict()

    def steps():
        for _ in range(ROUNDS):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            # Not watched: both threads may step or drop state, so that only the process is judged, and the errors.
            oracle.call(f"step beside a thread [{backend}]", made.step)

    beside(disturb, steps)


def compiled(rng, oracle):
    native = load.load_native()
    buffers = Buffers(rng)
    group = group_of(rng, buffers)
    kept = {name: list(getattr(group, name)) for name in LISTS}
    big = torch.ones(1 << 18)
    kind = rng.randrange(3)

    def disturb():
        name = rng.choice(LISTS)
        values = getattr(group, name)
        if kind == 0:
            values.clear()
            values.extend(kept[name])
        elif kind == 1:
            values[0] = torch.ones(3)
            values[0] = kept[name][0]
        else:
            native.sums_of_squares([big], [None], 2)
            native.step([group], 1)

    def steps():
        for _ in range(ROUNDS):
            oracle.call("native.step beside a thread", lambda: native.step([group], 2), sentences=False)

    beside(disturb, steps)
