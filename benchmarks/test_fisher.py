"""Measures the time to accumulate squared gradients: our kernel and two lines of torch, in one process."""

import os

import pytest
import torch

from childtune_fast.native import load

from .contestants import Contestant
from .race import Race
from .workloads import LARGE


@pytest.mark.parametrize("threads", [2, 1])
def test_fisher(benchmark, rounds, quiet_process, threads):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has fewer cores")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).mul_(1e-3) for shape in LARGE]
    scores = [torch.zeros(shape) for shape in LARGE]
    native = load.load_native()
    finite = []

    def ours():
        for score, grad in zip(scores, grads, strict=True):
            finite.append(native.accumulate_squares(score, grad, 1.0, 1.0, threads))

    def addcmul():
        for score, grad in zip(scores, grads, strict=True):
            score.addcmul_(grad, grad)

    def add_product():
        for score, grad in zip(scores, grads, strict=True):
            score.add_(grad * grad)

    contestants = {"ours": Contestant(ours), "addcmul": Contestant(addcmul), "add_product": Contestant(add_product)}
    race = Race(contestants, rounds(41), untimed_step=False)
    race.run(benchmark)
    benchmark.extra_info.update(
        weights=sum(grad.numel() for grad in grads),
        times_ns=race.times(),
        ratios=race.ratios("ours"),
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(finite)
    assert all(torch.isfinite(score).all() for score in scores)
