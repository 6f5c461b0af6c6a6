"""Measures the time of a step: ChildAdamW, torch's AdamW, the naive published code and the roof, in one process."""

import os

import pytest
import torch

from .contestants import make_contestants
from .race import Race
from .workloads import DTYPES, WORKLOADS, make_workload

ROUNDS = {"bert-base": 41, "1000x33": 101}


@pytest.mark.parametrize("threads", [2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark, rounds, quiet_process, workload, dtype, threads):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(threads)
    work = make_workload(WORKLOADS[workload], DTYPES[dtype])
    race = Race(make_contestants(work), rounds(ROUNDS[workload]), untimed_step=work.small)
    race.run(benchmark)
    benchmark.extra_info.update(
        tensors=len(work.params),
        weights=work.weights,
        times_ns=race.times(),
        ratios={name: race.ratios(name) for name in ("ours", "ours_p1")},
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(torch.isfinite(param).all() for param in work.params)
