"""The verdict on a GPU's kernels, on disk or by a proof in the background, and what becomes of the kernels then."""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple

from ..native import CudaError, gpu, load, verdict
from ..native.jit import cache_folder
from . import proof

_MORE = "`python -m childtune_fast prove` shows more; CHILDTUNE_GPU=trust takes them without a proof, =off never"


class Found(NamedTuple):
    """The device code of a GPU's kernels, and the verdict on it.

    Attributes:
        facts: what the verdict depends on.
        image: the device code; b"" if none could be made, or the driver refuses all that was.
        origin: the way in which it was made.
        outcome: the verdict on it; of the last way that was tried, if there is no image.
        kept: whether the verdict could be kept on disk.
        notes: the failures of the ways that were tried before, one line each.
    """

    facts: dict[str, Any]
    image: bytes
    origin: str
    outcome: proof.Outcome
    kept: bool
    notes: list[str]


class Proof(threading.Thread):
    """Finds the verdict on a GPU's kernels in the background, without a call to CUDA in this process.

    Attributes:
        found: what it has found, when the thread has ended.
    """

    def __init__(self, device: int) -> None:
        super().__init__(name=f"childtune_fast proof of GPU {device}", daemon=True)
        self.device, self.pid = device, os.getpid()
        self._properties = gpu.properties(device)
        self.found: Found | None = None

    def run(self) -> None:
        """Finds device code, and the verdict on it: on disk, or by a proof."""
        try:
            self.found = find(self.device, self._properties)
        except Exception as error:  # a thread that raises would only print
            unknown = verdict.made("unknown", f"{type(error).__name__}: {error}", 0.0)
            self.found = Found({}, b"", "", proof.Outcome(unknown), True, [])


def find(device: int, properties: Any, *, anew: bool = False) -> Found:
    """Returns the device code of a GPU's kernels and the verdict on it, which is kept on disk.

    Args:
        device: number of the GPU.
        properties: `gpu.properties(device)`.
        anew: whether to prove thoroughly even if there is a verdict on disk (default: False).
    """
    notes: list[str] = []
    of_gpu = verdict.facts_of(properties)
    for origin, image in gpu.images(device, properties, notes):
        facts = verdict.with_image(of_gpu, image)
        outcome, kept = _proved(device, image, facts, anew)
        if not outcome.refused:
            return Found(facts, image, origin, outcome, kept, notes)
        notes.append(f"{origin}: {outcome.verdict.cause}")
    nothing = verdict.made("unknown", "there are none: " + "; ".join(notes), 0.0)
    return Found({}, b"", "", proof.Outcome(nothing), True, notes)


def look(device: int, properties: Any) -> tuple[str, verdict.Verdict | None, list[str]]:
    """Returns how a GPU's device code is made, the verdict that is on disk, and the failures of the ways before.

    Args:
        device: number of the GPU.
        properties: `gpu.properties(device)`.
    """
    notes: list[str] = []
    of_gpu = verdict.facts_of(properties)
    for origin, image in gpu.images(device, properties, notes):
        return origin, verdict.stored(verdict.with_image(of_gpu, image)), notes
    return "", None, notes


def _proved(device: int, image: bytes, facts: dict[str, Any], anew: bool) -> tuple[proof.Outcome, bool]:
    """Returns the verdict on device code, on disk or by a proof, and whether it could be kept."""
    found = None if anew else verdict.stored(facts)
    if found is None and (why := _why_not()):
        return why, True
    if found is None:
        with verdict.one_at_a_time(facts):
            found = None if anew else verdict.stored(facts)  # which another process may just have written
            if found is None:
                outcome = proof.run_in_a_process(device, image, facts["UUID"], thorough=anew)
                return outcome, verdict.keep(facts, outcome.verdict)
    return proof.Outcome(found), True


def _why_not() -> proof.Outcome | None:
    """Returns why no proof is held in another process, or None."""
    if os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or os.path.exists("/tmp/nvidia-mps/control"):
        cause = "processes share the GPUs through MPS, where a kernel's fault would end them all"
        return proof.Outcome(verdict.made("unknown", cause, 0.0))
    if why := proof.why_no_process():
        return proof.Outcome(verdict.made("unknown", why, 0.0), here=not os.environ.get(proof.GUARD))
    return None


def judged(device: int, found: Found) -> Any:
    """Loads the kernels that have proved themselves and returns them, or warns and returns None.

    Where no second process may use the GPU, the cases run here first.

    Raises:
        CudaError: the driver cannot load them now.
    """
    ended = found.outcome.verdict
    kernels = None
    try:
        if found.image and (ended.word == "good" or found.outcome.here):
            if ended.word != "good":
                _, ended = prove_here(device, found)
            kernels = gpu.use(device, found.origin, found.image)
            if differs := proof.trial(device):
                ended = verdict.made("bad", f"in this process, {differs}", 0.0)
    except CudaError:
        raise
    except Exception as error:  # whatever it is, training goes on without the kernels
        ended = verdict.made("unknown", f"{type(error).__name__}: {error}", 0.0)
    if ended.word != "good":
        warn(device, ended.cause)
        return None
    if not found.kept:
        load.warn_once(
            f"childtune_fast: the verdict on the kernels of GPU {device} cannot be kept in {cache_folder()}, so that "
            "every process proves them anew; name a folder that can be written in the environment variable "
            "CHILDTUNE_CACHE"
        )
    return kernels


def prove_here(device: int, found: Found) -> tuple[tuple[proof.Told, ...], verdict.Verdict]:
    """Loads a GPU's kernels and runs all cases in this process; returns what was told of the cases, and the verdict."""
    gpu.use(device, found.origin, found.image)
    told: list[proof.Told] = []
    ended = proof.run(device, told.append)
    verdict.keep(found.facts, ended)
    return tuple(case for case in told if case.seconds >= 0), ended


def warn(device: int, cause: str) -> None:
    """Warns that "auto" leaves what is on a GPU to torch, and why."""
    load.warn_once(
        f"childtune_fast does not use its kernels on GPU {device}: {cause}\nThe slower pure-torch backend, with the "
        f"same results, runs there instead. {_MORE}."
    )
