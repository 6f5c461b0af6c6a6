"""The proof of a GPU's kernels: all cases, run in this process or in one of their own, and what their outcome means.

A wrong kernel can end a process or spoil its CUDA context for good, so the cases run in another process, which tells
what it does line by line. Where no second process may use the GPU they run here, the smallest first.
"""

from __future__ import annotations

import json
import os
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
_MARK = "childtune_fast proof: "
_CODE = (
    "import sys; del sys.path[0]; import json; job = json.loads(sys.argv[1]); sys.path[:] = job['sys_path']; "
    "from childtune_fast.ops.proof import main; main(job)"
)
# Variables that would make the process a rank of the user's job, or have a profiler load its code into it.
_NOT_INHERITED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "PYTHONSTARTUP"),
}


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
        refused: whether the driver does not load this device code, which then is no matter for a proof.
        here: whether the cases may yet run in this process, since no second one may use the GPU.
        told: what was told of the cases that have run to their end.
    """

    verdict: verdict.Verdict
    refused: bool = False
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


def run(device: int, tell: Callable[[Told], None], thorough: bool = False) -> verdict.Verdict:
    """Runs the cases in this process, on kernels that `gpu` has loaded.

    Args:
        device: number of the GPU.
        tell: called before a case runs, and after it has run to its end.
        thorough: whether to go on after a case that differs (default: False).
    """
    start, first = time.perf_counter(), ""
    for case in cases():
        tell(Told(case.name))
        began = time.perf_counter()
        try:
            differs = case.check(device)
        except Exception as error:
            word, cause = _meaning(error)
            return verdict.made(word, first or f"{case.name}: {cause}", time.perf_counter() - start)
        tell(Told(case.name, time.perf_counter() - began, differs))
        first = first or (f"{case.name}: {differs}" if differs else "")
        if first and not thorough:
            break
    return verdict.made("bad" if first else "good", first, time.perf_counter() - start)


def _meaning(error: Exception) -> tuple[verdict.Word, str]:
    """Returns what an error in a case says of the kernels: nothing, if there was no memory."""
    words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    no_memory = (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "code", None) == gpu.OUT_OF_MEMORY
    )
    return ("unknown" if no_memory else "bad"), words


# ---- In a process of its own ---------------------------------------------------------------------------------------


def why_no_process() -> str:
    """Returns why this process cannot start one that proves, or ""."""
    if os.environ.get(GUARD):
        return f"this process proves kernels itself ({GUARD} is set)"
    if getattr(sys, "frozen", False) or not sys.executable:
        return "this program is no Python that could be started again"
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
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "image")
        path.write_bytes(image)
        sys_path = [os.path.abspath(entry) for entry in sys.path]
        job = {"sys_path": sys_path, "device": device, "image": str(path), "uuid": uuid, "thorough": thorough}
        try:
            status, output = toolchain.run(
                [sys.executable, "-c", _CODE, json.dumps(job)], timeout=TIMEOUT, env=_environment()
            )
        except subprocess.TimeoutExpired as expired:
            return Outcome(_cut_short(f"it was not done after {TIMEOUT:.0f} s", _lines(expired.output)[0], start))
        except OSError as error:
            return Outcome(_cut_short(f"its process could not be started ({error})", [], start), here=True)
    return _outcome(status, output, start)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {name: value for name, value in kept.items() if not name.startswith("TORCHELASTIC_")} | {GUARD: "1"}


def _lines(output: bytes | str | None) -> tuple[list[Told], list[Any]]:
    """Returns what a process has told of its cases, and at its end: three fields of an Outcome, or nothing."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    marked = [line.removeprefix(_MARK) for line in text.splitlines() if line.startswith(_MARK)]
    lines = [json.loads(line) for line in marked if line.endswith("}")]  # the last may be cut off
    return [Told(*line["told"]) for line in lines if "told" in line], next((x["end"] for x in lines if "end" in x), [])


def _outcome(status: int, output: str, start: float) -> Outcome:
    told, end = _lines(output)
    if end:
        ended = tuple(case for case in told if case.seconds >= 0)
        return Outcome(verdict.Verdict(*end[0]), end[1], end[2], ended)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    if status in (0, -9) or not told:  # not by a kernel, as far as one can tell
        said = "\n".join(line for line in output.splitlines() if not line.startswith(_MARK))
        return Outcome(_cut_short(f"its process ended with {how}{toolchain.quoted(said)}", told, start))
    cause = f"{told[-1].case}: its process ended with {how}"
    return Outcome(verdict.made("bad", cause, time.perf_counter() - start))


def _cut_short(why: str, told: list[Told], start: float) -> verdict.Verdict:
    where = f"{told[-1].case}: " if told else ""
    return verdict.made("unknown", f"{where}{why}", time.perf_counter() - start)


def main(job: dict[str, Any]) -> None:
    """Runs the proof that `run_in_a_process` has asked for, and tells what comes of it."""
    if hasattr(os, "killpg"):
        threading.Thread(target=die_with_parent, daemon=True).start()
    outcome = _prove(job["device"], Path(job["image"]).read_bytes(), job["uuid"], job["thorough"])
    print(_MARK + json.dumps({"end": outcome[:3]}), flush=True)


def _prove(device: int, image: bytes, uuid: str, thorough: bool) -> Outcome:
    """Loads the kernels in this process, which was started for that, and runs the cases."""
    try:
        found = str(gpu.properties(device).uuid)
        torch.zeros(1, device=gpu.place(device))  # makes the context
    except Exception as error:  # the GPU is busy in exclusive mode, or its memory is full
        return Outcome(verdict.made("unknown", _meaning(error)[1], 0.0), here=True)
    if found != uuid:
        return Outcome(verdict.made("unknown", f"its process found another GPU ({found}, not {uuid})", 0.0))
    try:
        gpu.use(device, "given", image)
    except Exception as error:
        code = getattr(error, "code", None)
        unknown = verdict.made("unknown", _meaning(error)[1], 0.0)
        return Outcome(unknown, refused=code in gpu.LASTING, here=code == gpu.OUT_OF_MEMORY)
    judged = run(device, lambda told: print(_MARK + json.dumps({"told": told}), flush=True), thorough)
    return Outcome(judged, here=judged.word == "unknown")
