"""estimate_fisher: which parameters are scored, and how autograd may reach them."""

import pytest
import torch
from fisher_models import estimate, examples_of, make_batches, make_model, reference
from helpers import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_frozen_and_unselected_parameters_are_left_out():
    model, batches = make_model(), make_batches()
    everything = estimate(model, batches)
    model[0].weight.requires_grad_(False)
    assert list(estimate(model, batches)) == ["0.bias", "3.weight", "3.bias"]
    for selection in (r"\.bias$", lambda name: name.endswith("bias")):
        scores = estimate(model, batches, names=selection)
        assert list(scores) == ["0.bias", "3.bias"]
        assert all(same_bits(scores[name], everything[name]) for name in scores)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("per_example", [False, True])
def test_offloaded_scores_are_the_same(per_example):
    options = {"per_example": per_example, "grad_clip": 1e-2}
    expected = estimate(make_model(), make_batches(), **options)
    scores = estimate(make_model(), make_batches(), offload="cpu", **options)
    assert list(scores) == list(expected)
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_a_parameter_without_a_gradient_scores_zero():
    model = make_model()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[3](model[1](model[0](x)))
    scores = estimate(model, make_batches())
    assert scores["unused.weight"].tolist() == [[0, 0], [0, 0]]
    assert (scores["0.weight"] > 0).all()


@pytest.mark.parametrize("per_example", [False, True])
def test_tied_parameters_are_scored_once(per_example):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model, batches = Tied(), make_batches()
    scores = estimate(model, batches, per_example=per_example)
    assert "a.weight" in scores
    assert "b.weight" not in scores
    expected = reference(model, examples_of(batches) if per_example else batches)
    torch.testing.assert_close(scores["a.weight"], expected["a.weight"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)

    def checkpointed(model, batch):
        x = batch["x"].clone().requires_grad_()
        return nn.functional.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), batch["y"][0])

    scores = estimate(model, batches, loss_fn=checkpointed)
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_shared_weights_under_reentrant_checkpointing():
    """Their gradient comes in parts, which are added before it is squared."""

    def twice(model, batch, checkpointed):
        def run(x):
            return checkpoint(model, x, use_reentrant=True) if checkpointed else model(x)

        x = run(batch["x"].clone().requires_grad_())
        return run(nn.functional.pad(x, (0, 3))).square().sum()

    model, batches = make_model(), make_batches()
    scores, expected = (
        estimate(model, batches, loss_fn=lambda model, batch, c=c: twice(model, batch, c)) for c in (True, False)
    )
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-12)
