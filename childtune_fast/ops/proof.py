"""The proof of a GPU's kernels: all cases, run in this process or in one of their own, and what their outcome means.

A wrong kernel can end a process or spoil its CUDA context for good, so the cases run in another process, which writes
down what it does. Where no second process may use the GPU they run here, the smallest first.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..native import gpu, toolchain, verdict
from ..native.jit_child import die_with_parent
from .proof_scores import SelectionCase, SquaresCase, score_cases
from .proof_steps import StepCase, step_cases, trial_cases

TIMEOUT = 120.0  # seconds; on a GPU that does nothing else, a proof takes under 15
GUARD = "CHILDTUNE_PROVING"  # environment variable of the process that proves, so that it starts no further one
_CODE = "import sys; del sys.path[0]; import json; job = json.load(open(sys.argv[1])); sys.path[:] = job['sys_path']; "
_CODE += "from childtune_fast.ops.proof import main; main(job)"
# Variables that would make the process a rank of the user's job, or have a profiler load its code into it.
_NOT_INHERITED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "PYTHONSTARTUP"),
}
# By these a kernel's fault ends a process; other signals come from outside, as from a scheduler.
_CRASHES = {"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP"}
_FAULTS = range(700, 721)  # CUDA's codes of what kernels do wrong, such as an illegal address
_FAULT = re.compile("illegal|misaligned address|unspecified launch failure|device-side assert|hardware stack error")
_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)

Case = StepCase | SquaresCase | SelectionCase


class Told(NamedTuple):
    """What is told of one case.

    Attributes:
        case: its name.
        seconds: how long it took; -1 before it has run.
        differs: what differed, or "".
    """

    case: str
    seconds: float = -1.0
    differs: str = ""


class Outcome(NamedTuple):
    """What came of a proof.

    Attributes:
        verdict: what it has found.
        here: whether the cases may yet run in this process, since no second one may use the GPU.
        told: what was told of the cases that have run to their end.
    """

    verdict: verdict.Verdict
    here: bool = False
    told: tuple[Told, ...] = ()


def cases() -> Iterator[Case]:
    """Yields all cases of the proof, the smallest first."""
    yield from trial_cases()
    yield from score_cases()
    yield from step_cases()


def trial(device: int) -> str:
    """Runs the smallest cases in this process, on its current stream; returns what differed, or "".

    The proof cannot see what only this process has: its context, its streams, its memory.
    """
    return next((f"{case.name}: {differs}" for case in trial_cases() if (differs := case.check(device))), "")


def run(device: int, tell: Callable[[Told], None], thorough: bool = False) -> tuple[verdict.Verdict, bool]:
    """Runs the cases in this process, on kernels that `gpu` has loaded.

    Args:
        device: number of the GPU.
        tell: called before a case runs, and after it has run to its end.
        thorough: whether to go on after a case that differs (default: False).

    Returns:
        The verdict, and whether it is unknown for want of memory.
    """
    start, first = time.perf_counter(), ""
    for case in cases():
        tell(Told(case.name))
        began = time.perf_counter()
        try:
            differs = case.check(device)
        except Exception as error:
            word: verdict.Word = "bad" if first or _is_fault(error) else "unknown"
            cause = first or f"{case.name}: {_words(error)}"
            return verdict.made(word, cause, time.perf_counter() - start), lacks_memory(error)
        tell(Told(case.name, time.perf_counter() - began, differs))
        first = first or (f"{case.name}: {differs}" if differs else "")
        if first and not thorough:
            break
    return verdict.made("bad" if first else "good", first, time.perf_counter() - start), False


def lacks_memory(error: Exception) -> bool:
    """Returns whether an error says that there is no memory, on the GPU or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _code(error) == gpu.OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _is_fault(error: Exception) -> bool:
    """Returns whether an error says that a kernel has done what it must not."""
    return _code(error) in _FAULTS or (isinstance(error, RuntimeError) and _FAULT.search(str(error)) is not None)


def _code(error: Exception) -> object:
    """Returns CUDA's code of an error: the driver's, or that of torch's AcceleratorError; None if it has none."""
    return getattr(error, "code", getattr(error, "error_code", None))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


# ---- In a process of its own ---------------------------------------------------------------------------------------


def why_no_process() -> str:
    """Returns why this process cannot start one that proves, or ""."""
    if os.environ.get(GUARD):
        return f"this process proves kernels itself ({GUARD} is set)"
    if not toolchain.can_start_python():
        return f"this program is no Python that could be started again (sys.executable is {sys.executable!r})"
    return ""


def run_in_a_process(device: int, image: bytes, uuid: str, thorough: bool = False) -> Outcome:
    """Runs all cases in another process, on kernels that it loads from `image`.

    Args:
        device: number of the GPU, by which the other process finds it as this one does.
        image: device code.
        uuid: the GPU's identifier as torch has it; if the other process finds another one, nothing is known.
        thorough: as in `run` (default: False).
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "image").write_bytes(image)
        sys_path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        job = {"sys_path": sys_path, "device": device, "folder": name, "uuid": uuid, "thorough": thorough}
        (folder / "job").write_text(json.dumps(job))
        flags = [f for f in subprocess._args_from_interpreter_flags() if not f.startswith("-W")]  # type: ignore[attr-defined]
        try:
            status, output = toolchain.run(
                [sys.executable, *flags, "-c", _CODE, str(folder / "job")], timeout=TIMEOUT, env=_environment()
            )
            why = _end_of(status)
        except subprocess.TimeoutExpired:
            status, output, why = 0, "", f"it was not done after {TIMEOUT:.0f} s"
        except OSError as error:
            return Outcome(verdict.made("unknown", f"its process could not be started ({error})", 0.0), here=True)
        told, end = _written(folder)
    ended = tuple(one for one in told if one.seconds >= 0)
    if end:
        return Outcome(verdict.Verdict(*end[0]), end[1], ended)
    case = f"{told[-1].case}: " if told else ""
    crashed = status < 0 and signal.Signals(-status).name in _CRASHES and bool(told)
    cause = f"{case}{why}{'' if crashed else toolchain.quoted(output)}"
    judged = verdict.made("bad" if crashed else "unknown", cause, time.perf_counter() - start)
    return Outcome(judged, told=ended)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {name: value for name, value in kept.items() if not name.startswith("TORCHELASTIC_")} | {GUARD: "1"}


def _end_of(status: int) -> str:
    return f"its process ended with signal {-status}" if status < 0 else f"its process ended with status {status}"


def _written(folder: Path) -> tuple[tuple[Told, ...], list[Any]]:
    """Returns what a process has written of its cases, and at its end: two fields of an Outcome, or nothing."""
    lines = (folder / "told").read_text().splitlines() if (folder / "told").exists() else []
    told = tuple(Told(*json.loads(line)) for line in lines if line.endswith("]"))  # the last may be cut off
    return told, json.loads((folder / "end").read_text()) if (folder / "end").exists() else []


def main(job: dict[str, Any]) -> None:
    """Runs the proof that `run_in_a_process` has asked for, writes down what comes of it, and ends the process."""
    if hasattr(os, "killpg"):
        threading.Thread(target=die_with_parent, daemon=True).start()
    folder = Path(job["folder"])
    with (folder / "told").open("w", buffering=1) as file:

        def tell(told: Told) -> None:
            file.write(json.dumps(told) + "\n")

        outcome = _prove(job["device"], (folder / "image").read_bytes(), job["uuid"], job["thorough"], tell)
    (folder / "end.new").write_text(json.dumps([*outcome]))
    (folder / "end.new").rename(folder / "end")
    os._exit(0)  # whatever else runs in this process has no say in the outcome


def _prove(device: int, image: bytes, uuid: str, thorough: bool, tell: Callable[[Told], None]) -> Outcome:
    """Loads the kernels in this process, which was started for that, and runs the cases."""
    try:
        found = str(gpu.properties(device).uuid)
        torch.zeros(1, device=gpu.place(device))  # makes the context
    except Exception as error:  # the GPU is busy in exclusive mode, or its memory is full
        return Outcome(verdict.made("unknown", _words(error), 0.0), here=True)
    if found != uuid:
        return Outcome(verdict.made("unknown", f"its process found another GPU ({found}, not {uuid})", 0.0))
    try:
        gpu.use(device, "given", image)
    except Exception as error:
        word: verdict.Word = "refused" if _code(error) in gpu.LASTING - {0} else "unknown"
        return Outcome(verdict.made(word, _words(error), 0.0), here=lacks_memory(error))
    judged, no_memory = run(device, tell, thorough)
    return Outcome(judged, here=no_memory)
