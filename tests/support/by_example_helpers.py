"""Helpers of the tests of gradients by example: small models, losses, and the comparison with single passes."""

import warnings

import torch
from torch import nn

from childtune_fast import estimate_fisher
from childtune_fast.fisher.backward import Backward
from childtune_fast.fisher.by_example import ByExample
from childtune_fast.fisher.rules import Rows
from childtune_fast.fisher.sums import SquareSums

WIDTH, HIDDEN = 6, 8


class Model(nn.Module):
    """A model whose forward pass is a function, with a layer `a`, a head `h` and what else is given."""

    def __init__(self, function, **more):
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.h = nn.Linear(HIDDEN, 3)
        for name, value in more.items():
            setattr(self, name, value)
        self._function = function

    def forward(self, *inputs):
        return self._function(self, *inputs)


def plain(**more):
    return Model(lambda s, x: s.h(s.a(x).tanh().mean(1)), **more)


def random(*shape):
    return nn.Parameter(torch.randn(shape))


def batch(size=8, length=5, dtype=torch.float32):
    return {"x": torch.randn(size, length, WIDTH, dtype=dtype), "y": torch.arange(size) % 3}


def token_batch(size=8, length=5):
    return {"x": torch.randint(1, 20, (size, length)), "y": torch.arange(size) % 3}


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def one(batch, example):
    return {name: tensor[example : example + 1] for name, tensor in batch.items()}


def singles(batches):
    return [one(batch, i) for batch in batches for i in range(len(next(iter(batch.values()))))]


def split_gradients(model, batch, loss=loss_of):
    """{(name, example): gradient}, from one backward pass of the batch."""
    sums = SquareSums(model)
    backward = Backward(model, sums)
    found = {}

    def part_of(begin, end):
        return loss(model, {name: tensor[begin:end] for name, tensor in batch.items()})

    def sink(name, example, grad):
        assert (name, example) not in found
        found[name, example] = (grad.dense() if isinstance(grad, Rows) else grad).clone()

    with backward.hooks():
        by_example = ByExample(model, sums.params, backward)
        part = by_example.part(0, len(batch["x"]), part_of)
        assert part.examples == len(batch["x"])
        by_example.finish(part, sink)
    return found


def single_gradients(model, batch, loss=loss_of):
    """The same, by a pass for each example."""
    found = {}
    for i in range(len(batch["x"])):
        model.zero_grad()
        loss(model, one(batch, i)).backward()
        found.update({(name, i): p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return found


def state_of(model):
    """What an estimation must leave as it was, beside what restore.py restores."""
    return [
        (name, vars(module).get("forward"), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [bool(param._post_accumulate_grad_hooks) for param in model.parameters()]


def check_scores(model, batches, loss=loss_of, bound=1e-5, refused=None, **options):
    """Compares the scores of examples with those of single passes; returns the warnings.

    Args:
        refused: None if the batches' backward passes must be taken apart; else a text in the reason why they are not.
    """
    before, taken = state_of(model), []
    finish = ByExample.finish

    def counted(self, part, sink):
        finish(self, part, sink)
        taken.append(part.examples)

    ByExample.finish = counted
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = estimate_fisher(model, batches, loss_fn=loss, per_example=True, progress=False, **options)
    finally:
        ByExample.finish = finish
    assert state_of(model) == before
    reasons = [str(warning.message) for warning in caught if "slower way" in str(warning.message)]
    if refused is None:
        assert not reasons
        assert taken
    else:
        assert len(reasons) == 1
        assert refused in reasons[0]
    expected = estimate_fisher(model, singles(batches), loss_fn=loss, progress=False, **options)
    highest = max(float(score.max()) for score in expected.values())
    for name, score in expected.items():
        scale = max(float(score.max()), 1e-7 * highest)
        assert float((scores[name] - score).abs().max()) <= bound * scale, name
    return caught, taken
