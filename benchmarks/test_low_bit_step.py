"""Measures the time of a step with averages of few bits, of F and D, beside others with 8-bit state and the roof."""

import os

import pytest
import torch

from .contestants import held_to_narrower_sets
from .eight_bit import make_low_bit_child_contestants, make_low_bit_contestants
from .race import Race
from .workloads import DTYPES, LARGE, make_workload

NARROWER = ["ours", "ours_p1", "ours_p0.1"]


@pytest.mark.parametrize("threads", [2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_bit_step(benchmark, rounds, quiet_process, dtype, threads):
    _race(benchmark, rounds(41), threads, make_workload(LARGE, DTYPES[dtype]), make_low_bit_contestants)


@pytest.mark.parametrize("threads", [2])
def test_low_bit_child_step(benchmark, rounds, quiet_process, threads):
    _race(benchmark, rounds(41), threads, make_workload(LARGE, torch.float32), make_low_bit_child_contestants)


def _race(benchmark, rounds, threads, work, make_contestants):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(threads)
    contestants, scales = make_contestants(work)
    contestants |= held_to_narrower_sets(contestants, [name for name in NARROWER if name in contestants])
    race = Race(contestants, rounds, untimed_step=False)
    race.run(benchmark)
    benchmark.extra_info.update(
        weights=work.weights,
        times_ns=race.times(),
        ratios={name: race.ratios(name) for name in contestants if name.startswith("ours")},
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(torch.isfinite(param).all() for param in work.params)
    assert all(scale.all() for scale in scales)  # no block of zeros, whose step would be another
