"""estimate_fisher(per_example=True): each example counts once, whether or not vmap can run the model."""

import fisher_models
import pytest
import torch
from fisher_models import estimate, examples_of, make_batches, make_model
from helpers import same_bits
from torch import nn

from childtune_fast.fisher.by_example import ByExample
from childtune_fast.fisher.graph import NotCovered


@pytest.fixture
def slower(monkeypatch):
    """Refuses the way by a batch's own backward pass, so that the slower ones are taken."""

    def refused(*args):
        raise NotCovered("for a test")

    monkeypatch.setattr(ByExample, "part", refused)


def refusal():
    return pytest.warns(UserWarning, match=r"slower way, .* \(for a test\)")


def test_vmap_equals_single_examples(slower):
    """The same sums, of gradients that differ by the rounding of batched matrix products."""
    model, batches = make_model(), make_batches()
    with refusal() as caught:
        chunked = estimate(model, batches, per_example=True)
    assert len(caught) == 1
    single = estimate(model, examples_of(batches))
    for name, score in chunked.items():
        torch.testing.assert_close(score, single[name], rtol=1e-4, atol=1e-9)


class BranchesOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


@pytest.mark.filterwarnings("ignore:.*slower way")
def test_what_vmap_cannot_run_goes_by_single_examples(slower):
    model, batches = BranchesOnData(), make_batches()
    with pytest.warns(UserWarning, match="one example at a time, since .*vmap.* cannot .*RuntimeError: ") as caught:
        scores = estimate(model, batches, per_example=True)
    # The line that called estimate_fisher:
    assert [warning.filename for warning in caught] == 2 * [fisher_models.__file__]
    expected = estimate(model, examples_of(batches))
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_large_models_go_by_single_examples(slower, monkeypatch):
    monkeypatch.setattr("childtune_fast.fisher.examples._CHUNK_BYTES", 1000)
    monkeypatch.setattr(torch.func, "vmap", None)
    model, batches = make_model(), make_batches()
    expected = estimate(model, examples_of(batches))
    with refusal():
        scores = estimate(model, batches, per_example=True)
    assert all(same_bits(score, expected[name]) for name, score in scores.items())


@pytest.mark.filterwarnings("ignore:.*slower way")
def test_chunks_cover_every_example(slower, monkeypatch):
    """Three examples at a time of four: a chunk of three, and one of one."""
    model, batches = make_model(), make_batches()
    whole = estimate(model, batches, per_example=True)
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr("childtune_fast.fisher.examples._CHUNK_BYTES", 3 * size)
    for name, score in estimate(model, batches, per_example=True).items():
        torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*slower way")
def test_vmap_that_fails_half_way(slower, monkeypatch):
    """After the first chunk of two: every example is still counted once."""
    model, batches = make_model(), make_batches()
    expected = estimate(model, examples_of(batches))
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr("childtune_fast.fisher.examples._CHUNK_BYTES", 2 * size)
    vmap = torch.func.vmap

    def fails_later(*args, **options):
        results = iter([vmap(*args, **options)])
        return lambda *inputs: next(results)(*inputs)

    monkeypatch.setattr(torch.func, "vmap", fails_later)
    with pytest.warns(UserWarning, match="StopIteration"):
        scores = estimate(model, batches, per_example=True)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(3, 6), torch.zeros(())])
def test_examples_must_lie_in_dimension_0(x):
    batches = make_batches()
    batches[1]["x"] = x
    with pytest.raises(ValueError, match=r"batch 1: .*examples in dimension 0 \(got .*\); change the batch"):
        estimate(make_model(), batches, per_example=True)


@pytest.mark.cuda
@pytest.mark.parametrize("per_example", [False, True])
def test_on_a_gpu(per_example):
    """Batches from the CPU; gradients that differ by the rounding of matrix products."""
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches, per_example=per_example, grad_clip=0.05)
    model.cuda()
    state = torch.cuda.get_rng_state()
    scores = estimate(model, batches, per_example=per_example, grad_clip=0.05)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, score in scores.items():
        assert score.is_cuda
        torch.testing.assert_close(score.cpu(), expected[name], rtol=1e-3, atol=1e-9)
