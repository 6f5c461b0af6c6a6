"""Measures the time of a step of Child-Tuning_D: random child networks, plain AdamW and the roof, in one process."""

import os

import pytest
import torch

from .contestants import held_to_narrower_sets, make_child_contestants
from .race import Race
from .workloads import LARGE, make_workload


@pytest.mark.parametrize("threads", [2, 1])
def test_child_step(benchmark, rounds, quiet_process, threads):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(threads)
    work = make_workload(LARGE, torch.float32)
    contestants = make_child_contestants(work)
    contestants |= held_to_narrower_sets(contestants, ["ours", "ours_p0.1"])
    race = Race(contestants, rounds(41), untimed_step=False)
    race.run(benchmark)
    benchmark.extra_info.update(
        weights=work.weights,
        times_ns=race.times(),
        ratios={name: race.ratios(name) for name in contestants if name.partition("@")[0] in ("ours", "ours_p0.1")},
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(torch.isfinite(param).all() for param in work.params)
    assert not any(_has_denormals(state) for state in (*work.exp_avgs, *work.exp_avg_sqs))  # they slow some CPUs down


def _has_denormals(tensor):
    return bool(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).any())
