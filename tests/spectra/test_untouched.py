"""Analysing leaves the model, the process and the disk as they were, and takes little memory."""

import copy
import logging
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from childtune_fast import spectra


def model():
    torch.manual_seed(0)
    found = nn.Sequential(
        nn.Embedding(64, 32), nn.Linear(32, 48), nn.Dropout(), nn.BatchNorm1d(48), nn.MultiheadAttention(48, 2)
    )
    found[1].requires_grad_(False)
    found[2].eval()
    found[1:4](found[0](torch.arange(9))).sum().backward()
    return found


def state(model):
    """Everything of a model that an analysis could change."""
    params = [
        (name, p.data_ptr(), p._version, p.requires_grad, p.is_leaf, None if p.grad is None else p.grad._version)
        for name, p in model.named_parameters()
    ]
    values = [t.numpy().tobytes() for t in model.state_dict().values()]
    grads = [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None]
    return params, values, grads, [(module.training, len(module._forward_hooks)) for module in model.modules()]


def process():
    """Everything of the process that an analysis could change."""
    root = logging.getLogger()
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), list(warnings.filters),  # noqa: NPY002
        root.level, list(root.handlers), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
    )  # fmt: skip


def test_the_model_and_the_process_are_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    analysed, base = model(), model()
    before = state(analysed), state(base), process()
    found = spectra.analyze(analysed, base=base, null=2)
    print(found, found.summary())
    found.plot()
    spectra.plot_alpha({"a": found})
    assert (state(analysed), state(base), process()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_second_analysis_gives_the_same_bits():
    analysed = model()
    assert spectra.analyze(analysed, null=1).rows == spectra.analyze(copy.deepcopy(analysed), null=1).rows


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); from childtune_fast import spectra; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"matplotlib", "pandas", "safetensors", "scipy", "tqdm", "transformers"} == set()


# The peak is that of memory without files' pages, which the system takes back when it needs them.
MEASURED = """
import sys, threading, time, torch
from childtune_fast import spectra

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

spectra.analyze(torch.nn.Linear(64, 64), null=1, progress=False)  # imports, and threads of the linear algebra
model = sys.argv[1] if len(sys.argv) == 2 else torch.nn.Embedding(*map(int, sys.argv[1:]))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
spectra.analyze(model, null=1, progress=False)
done = True
thread.join()
print(peak - before)
"""
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def grown(*arguments):
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_proc
def test_memory_beyond_the_model_is_one_layer_and_its_gram_matrix():
    """Of 80,000 x 256: 164 MB in float64, and 0.5 MB."""
    rows, columns = 80_000, 256
    assert grown(rows, columns) < 8 * (rows * columns + columns**2)


@needs_proc
def test_a_stored_model_is_read_one_tensor_at_a_time(tmp_path):
    """Six layers of 16 MB each."""
    torch.manual_seed(0)
    save_file({f"{i}.weight": torch.randn(16_000, 256) for i in range(6)}, tmp_path / "model.safetensors")
    assert grown(tmp_path / "model.safetensors") < 3 * 16_000 * 256 * 4 + (4 << 20)
