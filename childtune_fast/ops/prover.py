"""The verdict on a GPU's kernels, on disk or by a proof in the background, and what becomes of the kernels then."""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple

from ..native import CudaError, gpu, verdict
from ..native.jit import cache_folder
from . import proof

_MORE = "`python -m childtune_fast prove` shows more; CHILDTUNE_GPU=trust takes them without a proof, =off never"
MPS = "processes share the GPUs through MPS, where a kernel's fault would end them all"


class Found(NamedTuple):
    """The device code of a GPU's kernels, and the verdict on it.

    Attributes:
        facts: what the verdict depends on.
        image: the device code; b"" if none could be made, or the driver refuses all that was.
        origin: the way in which it was made.
        outcome: the verdict on it, or why there is none.
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


def find(device: int, properties: Any, *, by_hand: bool = False) -> Found:
    """Returns the device code of a GPU's kernels and the verdict on it, which is kept on disk.

    Args:
        device: number of the GPU.
        properties: `gpu.properties(device)`.
        by_hand: whether to prove thoroughly even if there is a verdict on disk, and under MPS (default: False).
    """
    notes: list[str] = []
    of_gpu = verdict.facts_of(properties)
    for origin, image in gpu.images(device, properties, notes):
        facts = verdict.with_image(of_gpu, image)
        outcome, kept = _proved(device, image, facts, by_hand)
        if outcome.verdict.word != "refused":
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
        known = verdict.stored(verdict.with_image(of_gpu, image))
        if known is None or known.word != "refused":
            return origin, known, notes
        notes.append(f"{origin}: {known.cause}")
    return "", None, notes


def _proved(device: int, image: bytes, facts: dict[str, Any], by_hand: bool) -> tuple[proof.Outcome, bool]:
    """Returns the verdict on device code, on disk or by a proof, and whether it could be kept."""
    found = None if by_hand else verdict.stored(facts)
    if found is None and (why := why_not(by_hand)):
        return why, True
    if found is None:
        with verdict.one_at_a_time(facts):
            found = None if by_hand else verdict.stored(facts)  # which another process may just have written
            if found is None:
                outcome = proof.run_in_a_process(device, image, facts["UUID"], thorough=by_hand)
                return outcome, verdict.keep(facts, outcome.verdict)
    return proof.Outcome(found), True


def why_not(by_hand: bool = False) -> proof.Outcome | None:
    """Returns why no proof is held in another process, or None."""
    if not by_hand and (os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or os.path.exists("/tmp/nvidia-mps/control")):
        return proof.Outcome(verdict.made("unknown", MPS, 0.0))
    if why := proof.why_no_process():
        return proof.Outcome(verdict.made("unknown", why, 0.0), here=not os.environ.get(proof.GUARD))
    return None


def judged(device: int, found: Found) -> tuple[Any, str]:
    """Loads the kernels that have proved themselves; returns them, or None, and what to warn of, or "".

    Where no second process may use the GPU, the cases run here first.

    Raises:
        CudaError, torch.OutOfMemoryError: there is no memory now.
    """
    ended = found.outcome.verdict
    try:
        if ended.word != "good" and found.outcome.here and found.image:
            _, ended = prove_here(device, found)
        if ended.word == "good":
            kernels = gpu.use(device, found.origin, found.image)
            if not (differs := proof.trial(device)):
                return kernels, "" if found.kept else _not_kept(device)
            ended = verdict.made("bad", f"in this process, {differs}", 0.0)
    except Exception as error:  # whatever it is, training goes on without the kernels
        if proof.lacks_memory(error):
            raise
        ended = verdict.made("unknown", f"in this process, {type(error).__name__}: {error}", 0.0)
    return None, not_used(device, ended.cause)


def prove_here(device: int, found: Found) -> tuple[tuple[proof.Told, ...], verdict.Verdict]:
    """Loads a GPU's kernels and runs all cases in this process; returns what was told of the cases, and the verdict."""
    told: list[proof.Told] = []
    try:
        gpu.use(device, found.origin, found.image)
    except CudaError as error:
        return (), verdict.made("unknown", str(error), 0.0)
    ended, _ = proof.run(device, told.append)
    verdict.keep(found.facts, ended)
    return tuple(case for case in told if case.seconds >= 0), ended


def not_used(device: int, cause: str) -> str:
    """Returns the warning that "auto" leaves what is on a GPU to torch, and why."""
    return (
        f"childtune_fast does not use its kernels on GPU {device}: {cause}\nThe slower pure-torch backend, with the "
        f"same results, runs there instead. {_MORE}."
    )


def _not_kept(device: int) -> str:
    return (
        f"childtune_fast: the verdict on the kernels of GPU {device} cannot be kept in {cache_folder()}, so that every "
        "process proves them anew; name a folder that this user alone can write in the environment variable "
        "CHILDTUNE_CACHE"
    )
