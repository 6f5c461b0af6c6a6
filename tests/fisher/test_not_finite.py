"""Batches and examples whose loss or gradient is not finite: named, or left out and reported."""

import pytest
import torch
from fisher_models import SIZE, estimate, make_batches, make_model
from helpers import same_bits
from torch import nn

from childtune_fast import estimate_fisher


def spoiled_loss(model, batch):
    """Is multiplied by what the batch says for each example; the gradient of sqrt at 0 is infinite, its value 0."""
    losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"][0], reduction="none")
    roots = (losses * batch["root"]).sqrt() if "root" in batch else losses
    return (roots * batch["factor"]).mean()


def spoiled(batches, bad, kind):
    changed = []
    for index, batch in enumerate(batches):
        factor, root = torch.ones(SIZE), torch.ones(SIZE)
        for example in [example for number, example in bad if number == index]:
            if kind == "loss":
                factor[example] = torch.nan
            else:
                root[example] = 0.0
        changed.append({**batch, "factor": factor, "root": root})
    return changed


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05}, {"offload": "cpu"}])
def test_batches_are_left_out(kind, options):
    model, batches = make_model(), make_batches()
    with pytest.warns(UserWarning, match=r"2 of 5 were left out, .*: batch 0; batch 3$") as told:
        scores = estimate(
            model, spoiled(batches, [(0, 1), (3, 0)], kind), loss_fn=spoiled_loss, on_nonfinite="skip", **options
        )
    assert told[0].filename.endswith("fisher_models.py")  # the line that called estimate_fisher
    good = spoiled([batches[1], batches[2], batches[4]], [], kind)
    expected = estimate(model, good, loss_fn=spoiled_loss, **options)
    assert all(same_bits(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05}])
def test_examples_are_left_out(kind, options):
    model, batches = make_model(), make_batches()
    bad = [(0, 1), (3, 0), (3, 3)]
    with pytest.warns(UserWarning, match=r"3 of 20 were left out, .*batch 0, example 1; batch 3, example 0; batch 3"):
        scores = estimate(
            model, spoiled(batches, bad, kind), loss_fn=spoiled_loss, on_nonfinite="skip", per_example=True, **options
        )
    good = []
    for index, batch in enumerate(spoiled(batches, [], kind)):
        for i in range(SIZE):
            if (index, i) not in bad:
                one = {name: batch[name][i : i + 1] for name in ("x", "factor", "root")}
                good.append({**one, "y": [batch["y"][0][i : i + 1]]})
    expected = estimate(model, good, loss_fn=spoiled_loss, **options)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-12)


def test_nothing_left_out_says_nothing():
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)
    scores = estimate(model, batches, on_nonfinite="skip")
    assert all(same_bits(scores[name], expected[name]) for name in expected)


def test_all_left_out_raises():
    model, batches = make_model(), make_batches()
    bad = [(index, 0) for index in range(len(batches))]
    with pytest.raises(ValueError, match=r"5 of 5 were left out"):
        estimate(model, spoiled(batches, bad, "loss"), loss_fn=spoiled_loss, on_nonfinite="skip")
    with pytest.raises(ValueError, match=r"on_nonfinite must be 'raise' or 'skip' \(got 'ignore'\)"):
        estimate(model, batches, on_nonfinite="ignore")


@pytest.mark.parametrize(("per_example", "where"), [(False, "batch 2"), (True, "batch 2, example 3")])
def test_the_error_names_what_is_not_finite(per_example, where):
    batches = spoiled(make_batches(), [(2, 3)], "loss")
    with pytest.raises(ValueError, match=rf"{where}: the loss must be finite .*on_nonfinite='skip'"):
        estimate(make_model(), batches, loss_fn=spoiled_loss, per_example=per_example)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, input_ids, labels):
        logits = self.head(self.table(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_labels_that_are_all_ignored():
    """The mean over no words is not a number; the batch's is, which has words of other examples."""
    batch = {"input_ids": torch.arange(20).view(4, 5) % 9, "labels": torch.arange(20).view(4, 5) % 4}
    batch["labels"][1] = -100
    words = r"batch 0, example 1: the loss must be finite \(got \[nan\]\); its labels are all -100"
    with pytest.raises(ValueError, match=words):
        estimate_fisher(Tagger(), [batch], per_example=True, progress=False)
    estimate_fisher(Tagger(), [batch], progress=False)
    with pytest.warns(UserWarning, match="1 of 4 were left out, .*: batch 0, example 1$"):
        scores = estimate_fisher(Tagger(), [batch], per_example=True, on_nonfinite="skip", progress=False)
    others = {name: values[[0, 2, 3]] for name, values in batch.items()}
    expected = estimate_fisher(Tagger(), [others], per_example=True, progress=False)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=0)


def ctc(model, batch):
    log_probabilities = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(batch["x"]),), batch["x"].shape[1])
    targets = torch.full((len(batch["x"]),), batch["targets"].shape[1])
    return nn.functional.ctc_loss(log_probabilities, batch["targets"], lengths, targets)


def test_an_utterance_that_is_too_short():
    """Four frames cannot say three equal letters, which need a blank between them: the loss is infinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    batch = {"x": torch.randn(4, 4, 6), "targets": torch.tensor([[1, 2, 3], [2, 2, 2], [3, 1, 2], [4, 1, 3]])}
    with pytest.raises(ValueError, match=r"batch 0, example 1: the loss must be finite \(got \[inf\]\)"):
        estimate(model, [batch], loss_fn=ctc, per_example=True)
    with pytest.warns(UserWarning, match="1 of 4 were left out"):
        scores = estimate(model, [batch], loss_fn=ctc, per_example=True, on_nonfinite="skip")
    others = [{name: values[i : i + 1] for name, values in batch.items()} for i in (0, 2, 3)]
    expected = estimate(model, others, loss_fn=ctc)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=0)
