"""Measures what memory gives: GB/s of reads alone, of writes alone, and of a step's mix of both."""

import os

import pytest
import torch

from .contestants import Contestant
from .race import Race
from .roof import make_roof, make_stream
from .workloads import LARGE, make_workload

WORDS = 2**28  # of 4 bytes: more than any cache holds
STEP_BYTES = 28  # per float32 weight: p, g, m and v are read, p, m and v are written


@pytest.mark.parametrize("threads", [2, 1])
def test_bandwidth(benchmark, rounds, quiet_process, threads):
    """Counts the bytes that a program asks for; a processor may read what it is about to overwrite, too."""
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(threads)
    words = torch.ones(WORDS, dtype=torch.int32)
    work = make_workload(LARGE, torch.float32)
    contestants = {
        "mix": Contestant(make_roof(work)),
        "reads": Contestant(make_stream(words, write=False)),
        "writes": Contestant(make_stream(words, write=True)),
    }
    race = Race(contestants, rounds(21), untimed_step=False)
    race.run(benchmark)
    moved = {"mix": STEP_BYTES * work.weights, "reads": words.nbytes, "writes": words.nbytes}
    times = race.times()
    benchmark.extra_info.update(
        gb_per_s={name: moved[name] / times[name]["median"] for name in contestants},
        times_ns=times,
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert not words.any()  # it was written
