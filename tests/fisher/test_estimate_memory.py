"""estimate_fisher never holds a second set of gradients."""

import itertools
import weakref

import pytest
import torch
from fisher_models import BATCHES, estimate, loss_fn, make_batches
from torch import nn

from childtune_fast.fisher.sums import SquareSums


def test_never_a_second_gradient(monkeypatch):
    """When a gradient is squared, those before it are gone, and no parameter holds one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8)), nn.Linear(6, 3))
    seen, alive = [], []
    add = SquareSums.add

    def counting(self, kernels, name, grad):
        seen.append(weakref.ref(grad))
        alive.append(sum(ref() is not None for ref in seen))
        assert all(p.grad is None for p in model.parameters())
        return add(self, kernels, name, grad)

    monkeypatch.setattr(SquareSums, "add", counting)
    estimate(model, make_batches(), names="weight")
    assert len(seen) == 9 * BATCHES
    assert set(alive) == {1}


def peak_allocation(function):
    """The most bytes that torch's allocator had handed out at once during the call, beyond those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del kept
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_peak_memory_is_one_backward_and_the_scores(monkeypatch, backend):
    """Not even that: the gradients are not all there at once. The fallback has temporaries of single tensors."""
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
    model = nn.Sequential(nn.Linear(6, 128), *(nn.Linear(128, 128) for _ in range(20)), nn.Linear(128, 3))
    batches = make_batches()
    size = sum(4 * p.numel() for p in model.parameters())

    def backward():
        loss_fn(model, batches[0]).backward()

    one_backward = peak_allocation(backward)
    assert one_backward >= size
    model.zero_grad()
    assert peak_allocation(lambda: estimate(model, batches)) <= 1.5 * size
    assert 1.5 * size < one_backward + size
