"""estimate_fisher refuses to return scores that are all 0, with the likely cause."""

import pytest
import torch
from fisher_models import estimate, make_batches, make_model

MESSAGE = r"scored weights must change the loss \(got scores of 0 alone, in 4 tensors, the first '0.weight'\); "


def contrastive(model, batch):
    """In-batch contrast: each example is to be told from the others, and one alone is told without doubt."""
    output = model(batch["x"])
    return torch.nn.functional.cross_entropy(output @ output.detach().T, torch.arange(len(output)))


def test_a_contrastive_loss_by_example():
    with pytest.raises(ValueError, match=MESSAGE + "a loss that compares .*: pass per_example=False; else look for "):
        estimate(make_model(), make_batches(), loss_fn=contrastive, per_example=True)
    scores = estimate(make_model(), make_batches(), loss_fn=contrastive)
    assert all(tensor.any() for tensor in scores.values())


def test_weights_that_the_loss_does_not_reach():
    model, other = make_model(), torch.nn.Parameter(torch.ones(3))

    def beside(model, batch):
        with torch.no_grad():
            features = model(batch["x"])
        return (features * other).sum()

    with pytest.raises(ValueError, match=MESSAGE + "look for no_grad, or a detached tensor") as error:
        estimate(model, make_batches(), loss_fn=beside)
    assert "per_example" not in str(error.value)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_squares_that_are_0(offload):
    with pytest.raises(ValueError, match="gradients below 1e-23, as a tiny grad_clip makes them"):
        estimate(make_model(), make_batches(), grad_clip=1e-30, offload=offload)


@pytest.mark.parametrize("names", [None, "bias"])
def test_one_score_above_0_is_enough(names):
    scores = estimate(make_model(), make_batches(), loss_fn=lambda m, b: m[3].bias[2] * 1e-20, names=names)
    assert sum(int(tensor.count_nonzero()) for tensor in scores.values()) == 1
