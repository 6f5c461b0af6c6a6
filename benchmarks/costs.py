"""Measures single costs: memory that a step allocates, time inside the compiled call, time in a new process."""

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from childtune_fast.ops.packed_mask import PackedMask

ROOT = Path(__file__).resolve().parent.parent


def torch_allocations(step: Callable[[], object]) -> int:
    """Returns the bytes that torch's allocator hands out during `step()`, including those that are freed again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def python_allocations(step: Callable[[], object]) -> int:
    """Returns by how many bytes Python's own heap grows, at most, during `step()`."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of the tensors' memory; memory that several tensors share counts once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns all tensors of an optimizer's state, those of its masks included."""
    masks = getattr(optimizer, "child_masks", {}).values()
    return [tensor for state in optimizer.state.values() for tensor in state.values()] + mask_tensors(masks)


def mask_tensors(masks: Iterable[PackedMask]) -> list[torch.Tensor]:
    """Returns the tensors that masks hold: bits and index."""
    return [tensor for mask in masks for tensor in (mask.bits, mask.offsets)]


def resident_growth(step: Callable[[], object]) -> int | None:
    """Returns by how many bytes the process's resident memory grows, at most, during `step()`; None if unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, on Linux
    except OSError:
        return None
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class TimedCall:
    """Wraps a function and notes how many seconds each call takes."""

    def __init__(self, function: Callable) -> None:
        self._function = function
        self.seconds: list[float] = []

    def __call__(self, *args: object) -> object:
        """Calls the function, notes the seconds, and returns its result."""
        start = time.perf_counter()
        try:
            return self._function(*args)
        finally:
            self.seconds.append(time.perf_counter() - start)


def seconds_in_new_process(before: str, timed: str, **environment: str) -> float:
    """Returns the seconds that the code `timed` takes in a new Python that has run the code `before`."""
    code = f"import time\n{before}\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
    return number_in_new_process(code, **environment)


def number_in_new_process(code: str, **environment: str) -> float:
    """Returns the number that a new Python prints last when it runs `code`, with more environment variables."""
    env = {**os.environ, **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"a new process failed with status {ran.returncode}:\n{ran.stderr}")
    return float(ran.stdout.split()[-1])
