"""Measures the time of a step: ChildAdamW, other AdamW, the naive published code and the roof, in one process.

On BERT-base also in the processor's narrower instruction sets, as other processors would take it.
"""

import os

import pytest
import torch

from .contestants import held_to_narrower_sets, make_contestants
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
    contestants = make_contestants(work, slow=dtype != "float16")  # torch's are as slow there as in bfloat16
    if not work.small:
        contestants |= held_to_narrower_sets(contestants, ["ours", "ours_p1"])
    race = Race(contestants, rounds(ROUNDS[workload]), untimed_step=work.small)
    race.run(benchmark)
    benchmark.extra_info.update(
        tensors=len(work.params),
        weights=work.weights,
        times_ns=race.times(),
        ratios={name: race.ratios(name) for name in contestants if name.startswith("ours")},
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(torch.isfinite(param).all() for param in work.params)
