"""Losses and gradients that are not finite: the message names the batch and the example, or they are left out."""

import by_example_helpers as helpers
import pytest
import torch
from by_example_helpers import WIDTH, Model, batch, loss_of, plain
from torch import nn
from torch.nn import functional as F

from childtune_fast import estimate_fisher

EVERY = [{}, {"grad_clip": 0.05}, {"offload": "cpu"}]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spoiled(examples, value=float("nan"), size=8):
    found = batch(size)
    found["x"][examples, 1] = value
    return found


class InfiniteGradient(torch.autograd.Function):
    """Leaves a loss as it is, and makes its gradient infinite where the input is large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.masked_fill(x > 100, float("inf"))


def scores(model, batches, loss=loss_of, **options):
    return estimate_fisher(model, batches, loss_fn=loss, progress=False, **options)


def assert_close(found, expected):
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=1e-6 * float(score.max()))


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("bad", [(0, [0]), (0, [7]), (1, [2]), (1, [0, 5])])
def test_examples_are_left_out(options, bad):
    model, (number, examples) = plain(), bad
    batches = [batch(), batch(), batch()]
    good = helpers.singles(batches)
    batches[number]["x"][examples, 1] = float("inf")
    with pytest.raises(ValueError, match=f"batch {number}, example {examples[0]}: the loss must be finite"):
        scores(model, batches, per_example=True, **options)
    names = "; ".join(f"batch {number}, example {example}" for example in examples)
    with pytest.warns(UserWarning, match=f"{len(examples)} of 24 were left out, .* not finite: {names}$") as caught:
        found = scores(model, batches, per_example=True, on_nonfinite="skip", **options)
    assert len(caught) == 1
    rest = [one for i, one in enumerate(good) if i - 8 * number not in examples]
    assert_close(found, scores(model, rest, **options))


@pytest.mark.parametrize("per_example", [False, True])
def test_gradients_are_left_out(per_example):
    """The loss is finite; what the backward pass had added before it came to the gradient is taken back."""
    model = Model(lambda s, x: s.h(s.a(InfiniteGradient.apply(s.g(x))).tanh().mean(1)), g=nn.Linear(WIDTH, WIDTH))
    batches = [batch(), spoiled([2], 1e6), batch()]
    where = "batch 1, example 2" if per_example else "batch 1"
    with pytest.raises(ValueError, match=f"{where}: the gradient of 'g.*must be finite"):
        scores(model, batches, per_example=per_example)
    with pytest.warns(UserWarning, match=f"1 of {24 if per_example else 3} were left out, .*: {where}$"):
        found = scores(model, batches, per_example=per_example, on_nonfinite="skip")
    rest = helpers.singles(batches)
    del rest[10]
    assert_close(found, scores(model, rest if per_example else [batches[0], batches[2]]))


def ctc(model, batch):
    """An utterance of few frames cannot have a long text."""
    logits = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(batch["x"]),), 5)
    return F.ctc_loss(logits, batch["y"], lengths, (batch["y"] > 0).sum(1))


@pytest.mark.parametrize("per_example", [False, True])
def test_an_utterance_that_is_too_short(per_example):
    model = Model(lambda s, x: s.h(s.a(x).tanh()))
    texts = torch.tensor([[1, 2, 0, 0], [2, 1, 2, 0], [1, 0, 0, 0], [2, 1, 0, 0]])
    too_long = texts.clone()
    too_long[2] = torch.tensor([1, 1, 1, 1])  # 4 characters and 3 blanks between them
    batches = [{**batch(4), "y": texts}, {**batch(4), "y": too_long}, {**batch(4), "y": texts}]
    where = "batch 1, example 2" if per_example else "batch 1"
    with pytest.raises(ValueError, match=rf"{where}: the loss must be finite \(got \[inf\]\)"):
        scores(model, batches, ctc, per_example=per_example)
    with pytest.warns(UserWarning, match=f"1 of {12 if per_example else 3} were left out, .*: {where}$"):
        assert scores(model, batches, ctc, per_example=per_example, on_nonfinite="skip")
