"""estimate_fisher leaves modules as they were: buffers, attributes, and generators of their own."""

import random

import numpy as np
import pytest
import torch
from fisher_models import estimate, loss_fn, make_batches, make_model
from helpers import same_bits
from torch import nn


class Growing(nn.Module):
    """Whose first forward pass registers, deletes and changes what a module has."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()
        self.register_buffer("first", torch.zeros(2))
        self.register_buffer("deleted", torch.ones(3))
        self.register_buffer("kept_out", torch.ones(4), persistent=False)
        self.register_buffer("last", torch.ones(5))
        self.calls, self.cache = 0, None

    def forward(self, x):
        if self.calls == 0:
            self.register_buffer("mean", x.mean(0))
            self.register_buffer("hidden", x.mean(0), persistent=False)
            del self.deleted
            del self.kept_out
            self.register_buffer("kept_out", torch.zeros(4))
        self.calls += 1
        self.cache = x
        self.first += 1
        return self.inner(x)


def state_of(model):
    return [
        [(name, buffer, buffer.tolist()) for name, buffer in model.named_buffers()],
        list(model.state_dict()),
        set(model._non_persistent_buffers_set),
        {name: value for name, value in vars(model).items() if not name.startswith("_")},
    ]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore:estimate_fisher.*vmap")
def test_buffers_and_attributes_of_the_first_forward(per_example):
    model = Growing()
    before, buffers = state_of(model), list(model.buffers())
    estimate(model, make_batches(), per_example=per_example)
    after = state_of(model)
    for (name, buffer, values), (name2, buffer2, values2) in zip(before[0], after[0], strict=True):
        assert (name, values) == (name2, values2)
        assert buffer is buffer2
    assert before[1:] == after[1:]
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    model(make_batches()[0]["x"])  # which registers them, as they are not there
    assert {"mean", "hidden"} <= dict(model.named_buffers()).keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torchscript():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.linear(x)

    model = torch.jit.script(Counts())
    before = model.linear.weight.clone()
    scores = estimate(model, make_batches())
    assert scores["linear.weight"].all()
    assert model.seen == 0
    assert same_bits(model.linear.weight, before)


GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda rng: torch.rand((), generator=rng).item()),
    "Python": (lambda: random.Random(1), lambda rng: rng.random()),
    "numpy": (lambda: np.random.default_rng(1), lambda rng: rng.random()),
    "numpy's bits": (lambda: np.random.PCG64(1), lambda rng: rng.random_raw()),
    "numpy's Mersenne Twister": (lambda: np.random.Generator(np.random.MT19937(1)), lambda rng: rng.normal()),
    "numpy's old": (lambda: np.random.RandomState(1), lambda rng: rng.normal()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_a_module(kind):
    make, draw = GENERATORS[kind]
    model = make_model()
    model[1].rng = rng = make()
    same = make()
    draw(rng), draw(same)

    def loss(model, batch):
        draw(model[1].rng)
        model[1].rng = make() if model[1].rng is rng else model[1].rng
        return loss_fn(model, batch)

    estimate(model, make_batches(), loss_fn=loss)
    assert model[1].rng is rng
    assert [draw(rng) for _ in range(5)] == [draw(same) for _ in range(5)]


def test_a_generator_without_a_state_does_not_hurt():
    model = make_model()
    model[1].rng = random.SystemRandom()
    estimate(model, make_batches())
