"""Helpers of the tests on a GPU: models there, gradients that were drawn on the CPU, comparison by bits."""

import contextlib

import torch
from child_models import Model
from helpers import same_bits, set_grads

from childtune_fast import ChildAdamW

DEVICE = "cuda"


def model_on(device, dtype=torch.float32, **options):
    return Model(dtype, **options).to(device)


def optimizer_of(model, **options):
    return ChildAdamW(model.parameters(), **{"lr": 1e-2, "seed": 7, **options})


def set_cpu_grads(model, step):
    """Gradients that were drawn on the CPU."""
    params = list(model.parameters())
    given = [torch.empty_like(p, device="cpu") for p in params]
    set_grads(given, step)
    for p, q in zip(params, given, strict=True):
        p.grad = q.grad.to(p.device)


def train(model, optimizer, steps):
    for step in steps:
        set_cpu_grads(model, step)
        optimizer.step()


def assert_same_bits(one, other):
    """Of the parameters of two models, and of everything in the state of their optimizers."""
    (model_a, a), (model_b, b) = one, other
    for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert same_bits(p.cpu(), q.cpu())
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert same_bits(value.cpu(), b.state[q][key].cpu()), key


def assert_replays_as_steps(captured, plain):
    """Captures a step of one run in a CUDA graph, and replays it with the gradients of another run's steps."""
    for run in (captured, plain):
        train(*run, [0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured[1].step()
    for step in range(1, 5):
        train(*plain, [step])
        for p, q in zip(captured[0].parameters(), plain[0].parameters(), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
    assert_same_bits(captured, plain)


@contextlib.contextmanager
def no_waiting():
    """In it, torch raises if the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
