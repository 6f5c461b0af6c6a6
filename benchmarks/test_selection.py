"""Measures time and memory to choose a child network among many scores: our selection and numpy's percentile."""

import math
import os

import pytest
import torch

from .contestants import Contestant
from .costs import number_in_new_process
from .race import Race
from .selection import CONTESTANTS, make_scores


def test_selection(benchmark, rounds, quiet_process):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(2)
    scores = make_scores()
    contestants = {name: Contestant(lambda choose=choose: choose(scores)) for name, choose in CONTESTANTS.items()}
    race = Race(contestants, rounds(5), untimed_step=False)
    race.run(benchmark)
    benchmark.extra_info.update(
        scores=sum(tensor.numel() for tensor in scores),
        times_ns=race.times(),
        ratios=race.ratios("ours"),
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )


def test_selection_memory(benchmark):
    """Measures the memory in `extra_bytes`, on which the promise is; the fixture times the processes."""
    found = {}

    def processes():
        for name in CONTESTANTS:
            code = f"from benchmarks.selection import extra_memory; print(extra_memory({name!r}))"
            found[name] = number_in_new_process(code)

    benchmark.pedantic(processes)
    benchmark.extra_info["extra_bytes"] = {name: grown for name, grown in found.items() if not math.isnan(grown)}
