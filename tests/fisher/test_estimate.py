"""estimate_fisher: its values against float64 and the published code's, and how it is used."""

import copy

import pytest
import torch
from fisher_models import BATCHES, estimate, examples_of, loss_fn, make_batches, make_model, reference
from helpers import same_bits

from childtune_fast import estimate_fisher


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_float64_oracle(per_example, grad_clip):
    """A float64 model, so that gradients carry no error of their own.

    Then each of the n terms is exact to 2^-50, each of the n sums in float32 rounds by 2^-24 of itself, and so does the
    division: in all less than (n + 2) * 2^-24 of the mean, as all terms are positive.
    """
    model, batches = make_model(dtype=torch.float64), make_batches(dtype=torch.float64)
    parts = examples_of(batches) if per_example else batches
    expected = reference(model, parts, grad_clip)
    scores = estimate(model, batches, per_example=per_example, grad_clip=grad_clip)
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert ((score.double() - expected[name]).abs() <= (len(parts) + 2) * 2**-24 * expected[name]).all()
    if grad_clip is not None:
        assert any(not torch.allclose(scores[n], s.float()) for n, s in reference(model, parts).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_precision_against_its_own_gradients(dtype):
    """The gradients are the model's; only their squares and sums are ours."""
    model, batches = make_model(dtype=dtype), make_batches(dtype=dtype)
    expected = {name: 0.0 for name, _ in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, p in model.named_parameters():
            expected[name] = expected[name] + p.grad.double() ** 2 / BATCHES
    for name, score in estimate(model, batches).items():
        # As above; a square rounds once more. Below float32's normal range errors are absolute.
        bound = (BATCHES + 3) * 2**-24 * expected[name] + BATCHES * 2**-149
        assert ((score.double() - expected[name]).abs() <= bound).all()


def test_published_recipe_with_dropout():
    """Dropout draws the same as in a plain loop. Norms round differently (ours are sums in double), hence a tolerance:
    the factor's error is at most about that of a float32 norm of 240 terms, 2^-24 * 240, and counts twice."""
    model, batches = make_model(dropout=0.3), make_batches()
    model.train()
    torch.manual_seed(5)
    expected = reference(model, batches, grad_clip=0.1)
    model.eval()
    torch.manual_seed(5)
    scores = estimate(model, batches, grad_clip=0.1, train_mode=True)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=2 * 240 * 2**-24, atol=0)
    plain = estimate(model, batches, grad_clip=0.1)
    assert any((plain[name] != scores[name]).any() for name in scores)


@pytest.mark.parametrize("per_example", [False, True])
def test_native_equals_fallback(monkeypatch, per_example):
    model, batches = make_model(), make_batches()
    results = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
        results.append(estimate(model, batches, per_example=per_example, grad_clip=0.05))
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])


def test_seed_governs_dropout():
    model, batches = make_model(dropout=0.5), make_batches()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(estimate(model, torch.utils.data.DataLoader(batches, batch_size=None), train_mode=True))
    assert all(same_bits(results[0][n], results[1][n]) for n in results[0])
    assert any(not same_bits(results[0][n], results[2][n]) for n in results[0])


def test_max_batches_takes_no_more():
    taken = []
    model, batches = make_model(), make_batches()

    def stream():
        for batch in batches:
            taken.append(batch)
            yield batch

    scores = estimate(model, stream(), max_batches=2)
    assert len(taken) == 2
    assert all(same_bits(scores[name], s) for name, s in estimate(model, batches[:2]).items())


def test_progress_bar(capsys):
    estimate(make_model(), make_batches(), progress=True, max_batches=3)
    assert "3/3" in capsys.readouterr().err


def test_progress_bar_of_a_dataloader_that_does_not_know_its_length():
    class Unknown(list):
        def __len__(self):
            raise NotImplementedError

    model, batches = make_model(), make_batches()
    got, expected = estimate(model, Unknown(batches), progress=True), estimate(model, batches)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_transformers_batches_need_no_loss_fn():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    batch = transformers.BatchEncoding(
        {"input_ids": torch.randint(30, (4, 7)), "attention_mask": torch.ones(4, 7), "labels": torch.arange(4) % 2}
    )
    scores = estimate_fisher(model, [batch] * 2, progress=False)
    model.eval()
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(scores[name], p.grad.square(), rtol=2**-22, atol=1e-30)
    original = copy.deepcopy(model.state_dict())
    assert all(same_bits(original[name], value) for name, value in model.state_dict().items())
