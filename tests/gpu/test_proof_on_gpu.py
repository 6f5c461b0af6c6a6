"""On a GPU: its kernels prove themselves, in time and in little of its memory, and then serve "auto"."""

import threading
import warnings

import pytest
import torch
from gpu_runs import DEVICE, assert_same_bits, model_on, optimizer_of, train

from childtune_fast.native import gpu
from childtune_fast.ops import proof, prover, trust

pytestmark = pytest.mark.cuda
SECONDS, BYTES = 15.0, 600e6


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has met no GPU yet, with a cache of its own."""
    monkeypatch.setenv("CHILDTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("CHILDTUNE_GPU", raising=False)
    for known in ("_settled", "_proofs", "_failures"):
        monkeypatch.setattr(trust, known, {})


def test_the_proof_passes_in_time_and_in_little_memory():
    for _ in gpu.images(0, gpu.properties(0), []):  # compiles, which is not the proof's time
        break
    least, done = [torch.cuda.mem_get_info(0)[0]], threading.Event()
    before = least[0]

    def watch():
        while not done.wait(0.02):
            least[0] = min(least[0], torch.cuda.mem_get_info(0)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = prover.find(0, gpu.properties(0), by_hand=True)
    finally:
        done.set()
        watcher.join()
    assert found.outcome.verdict.word == "good", found.outcome.verdict
    assert len(found.outcome.told) == len(list(proof.cases()))
    assert found.outcome.verdict.seconds < SECONDS
    assert before - least[0] < BYTES


def test_auto_goes_over_to_the_kernels():
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in (DEVICE, "cpu"):
            model = model_on(device)
            runs.append((model, optimizer_of(model)))
            train(*runs[-1], [0])
            if device == DEVICE:
                trust._proofs[0].join()
            train(*runs[-1], [1, 2])
    assert trust._settled[0] is not None
    assert_same_bits(*runs)


def test_the_cases_pass_in_this_process_too():
    gpu.load_kernels(0)
    verdict, _ = proof.run(0, lambda told: None)
    assert verdict.word == "good", verdict
