"""Losses that take backward passes themselves: inside of the loss, or in a hook on it."""

import pytest
import torch
from fisher_models import estimate, examples_of, loss_fn, make_batches, make_model
from torch import nn


def adversarial(model, batch, inner):
    """Adds the loss at inputs that were moved along their gradient (FGM); `inner` computes the gradient."""
    x = batch["x"].clone().requires_grad_()
    inner(loss_fn(model, {**batch, "x": x}), x)
    moved = batch["x"] + 0.1 * x.grad.sign()
    return loss_fn(model, batch) + loss_fn(model, {**batch, "x": moved})


def by_backward(loss, x):
    loss.backward()  # leaves gradients at the weights, too


def by_grad(loss, x):
    (x.grad,) = torch.autograd.grad(loss, [x])


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore:.*slower way", "ignore:.*since torch.func.vmap cannot run")
def test_backward_inside_of_the_loss(per_example):
    model, batches = make_model(dtype=torch.float64), make_batches(dtype=torch.float64)
    parts = examples_of(batches) if per_example else batches
    expected = estimate(model, parts, loss_fn=lambda model, batch: adversarial(model, batch, by_grad))
    scores = estimate(
        model, batches, loss_fn=lambda model, batch: adversarial(model, batch, by_backward), per_example=per_example
    )
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=0)
    assert all(param.grad is None for param in model.parameters())


def test_gradients_inside_of_the_loss_are_as_usual():
    """The loss itself reads what its own backward passes have added up."""
    model, batches = make_model(), make_batches()
    seen = []

    def loss(model, batch):
        model.zero_grad()
        for _ in range(2):
            loss_fn(model, batch).backward()
        seen.append(model[0].weight.grad.clone())
        return loss_fn(model, batch)

    estimate(model, batches[:1], loss_fn=loss)
    (once,) = torch.autograd.grad(loss_fn(model, batches[0]), [model[0].weight])
    torch.testing.assert_close(seen[0], 2 * once)


def cached(model, batch, chunk=2):
    """Computes gradients of the outputs first, and those of the weights chunk by chunk, in a hook (GradCache)."""
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in batch["x"].split(chunk)])
    outputs.requires_grad_()
    loss = nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))
    (grads,) = torch.autograd.grad(loss, [outputs])

    def backward(grad):
        with torch.enable_grad():
            for part, of_part in zip(batch["x"].split(chunk), grads.split(chunk), strict=True):
                (model(part) * of_part * grad).sum().backward()

    result = loss.detach().requires_grad_()
    result.register_hook(backward)
    return result


def test_a_hook_of_the_loss_that_runs_backward():
    model, batches = make_model(dtype=torch.float64), make_batches(dtype=torch.float64)

    def plain(model, batch):
        outputs = model(batch["x"])
        return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    expected = estimate(model, batches, loss_fn=plain)
    scores = estimate(model, batches, loss_fn=cached)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_cached_loss_of_sentence_transformers():
    st = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")

    class Words(nn.Module):  # a module of sentence_transformers, as far as the losses know
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, features):
            vectors = self.layer(self.table(features["input_ids"])).mean(1)
            return {**features, "sentence_embedding": vectors}

    torch.manual_seed(0)
    model = st.SentenceTransformer(modules=[Words()], device="cpu").double()
    batches = [[torch.randint(20, (6, 5)), torch.randint(20, (6, 5))] for _ in range(3)]

    def scores(loss):
        def loss_fn(_, batch):
            return loss([{"input_ids": ids} for ids in batch], None)

        return estimate(model, batches, loss_fn=loss_fn)

    plain = scores(losses.MultipleNegativesRankingLoss(model))
    for name, score in scores(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)).items():
        torch.testing.assert_close(score, plain[name], rtol=1e-4, atol=1e-12)


def test_a_pass_that_begins_after_ours_is_refused():
    """What it adds to a gradient that was squared already would have to be squared together with it."""
    model, batches = make_model(), make_batches()

    def loss(model, batch):
        x = batch["x"].clone().requires_grad_()  # whose gradient comes after those of the weights

        def late(grad):
            with torch.enable_grad():
                loss_fn(model, batch).backward()

        x.register_hook(late)
        return loss_fn(model, {**batch, "x": x})

    with pytest.raises(RuntimeError, match=r"must come first \(it reached '.*' after its gradient was complete\)"):
        estimate(model, batches, loss_fn=loss)
