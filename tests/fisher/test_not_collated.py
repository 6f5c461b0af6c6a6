"""Batches that no data loader has put into tensors: sentences with the remedy, and none where a loss can do without."""

import pytest
import torch
from fisher_models import estimate, loss_fn, make_batches, make_model
from models import family
from torch.utils.data import DataLoader

from childtune_fast import estimate_fisher

DATA = [{"input_ids": [4, 5, 6 + i], "attention_mask": [1, 1, 1], "label": i % 3} for i in range(6)]
LABELS = [{("labels" if name == "label" else name): value for name, value in one.items()} for one in DATA]
IN_TENSORS = [{name: torch.tensor(value) for name, value in one.items()} for one in LABELS]
COLLATE = r"collate_fn such as transformers' DataCollatorWithPadding\(tokenizer\)"


def own(model, batch):
    return model(**batch).loss


def as_trainer(model, batch):
    return model(**dict(batch)).loss


LOSSES = pytest.mark.parametrize("fn", [None, own, as_trainer])


def scores_of(batches, fn=None):
    return estimate_fisher(family("BERT", num_labels=3)[0], batches, loss_fn=fn, progress=False)


@LOSSES
@pytest.mark.parametrize("data", [DATA, LABELS, IN_TENSORS, [{"input_ids": [1], "labels": 1}] * 6])
def test_a_list_of_examples(data, fn):
    loader = DataLoader(data, batch_size=2, collate_fn=lambda examples: examples)
    with pytest.raises(TypeError, match=rf"got a list of 2 mappings\); give the DataLoader a {COLLATE}"):
        scores_of(loader, fn)


@LOSSES
@pytest.mark.parametrize("data", [DATA, LABELS])
def test_a_data_set_in_place_of_a_loader(data, fn):
    with pytest.raises(TypeError, match=r"got no tensors, but plain input_ids, attention_mask, labels?\); pass a Da"):
        scores_of(data, fn)


@LOSSES
def test_a_data_set_of_tensors_in_place_of_a_loader(fn):
    expected = rf"got labels without dimensions, as of one example\); pass a DataLoader with a {COLLATE}"
    with pytest.raises(TypeError, match=expected):
        scores_of(IN_TENSORS, fn)


@LOSSES
def test_lists_that_torch_has_collated(fn):
    """Its own collation makes a list of tensors of them, one for each position."""
    loader = DataLoader(LABELS, batch_size=2)
    with pytest.raises(TypeError, match=r"got lists of tensors in input_ids, attention_mask\); give the DataLoader a "):
        scores_of(loader, fn)


@pytest.mark.parametrize("fn", [None, lambda model, batch: model(**batch).loss])
def test_strings_that_are_left_in(fn):
    batch = {"x": torch.ones(2, 6), "labels": torch.tensor([0, 1]), "text": ["one", "two"]}
    with pytest.raises(TypeError, match=r"got strings in text\); tokenize them, .* remove_columns\(\)"):
        estimate(make_model(), [batch], loss_fn=fn)


def test_lists_beside_tensors():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": [0, 1]}
    with pytest.raises(TypeError, match=r"batch 0: .*\(AttributeError; got plain labels\); give the DataLoader"):
        scores_of([batch], own)


def test_per_example_needs_tensors():
    with pytest.raises(ValueError, match=r"\(got no tensor\); pass a DataLoader with a collate_fn that makes tensors"):
        estimate(make_model(), DATA, per_example=True)


def test_a_loss_that_takes_such_batches_may():
    def from_list(model, batch):
        return loss_fn(model, {"x": torch.stack([one["x"] for one in batch]), "y": [batch[0]["y"]]})

    def from_plain(model, batch):
        return loss_fn(model, {"x": torch.tensor(batch["x"]), "y": [torch.tensor(batch["y"])]})

    expected = estimate(make_model(), make_batches())
    lists = [[{"x": x, "y": batch["y"][0]} for x in batch["x"]] for batch in make_batches()]
    plain = [{"x": batch["x"].tolist(), "y": batch["y"][0].tolist()} for batch in make_batches()]
    for batches, fn in ((lists, from_list), (plain, from_plain)):
        scores = estimate(make_model(), batches, loss_fn=fn)
        assert all(torch.equal(scores[name], tensor) for name, tensor in expected.items())


def test_errors_of_another_kind_are_raised_as_they_are():
    def fails(model, batch):
        raise error

    for error in (RuntimeError("mine"), KeyError("mine"), ZeroDivisionError("mine")):
        for batch in ([{"x": 1}], {"x": [1, 2]}):
            with pytest.raises(type(error), match=r"^'?mine'?$"):
                estimate(make_model(), [batch], loss_fn=fails)
    with pytest.raises(ValueError, match=r"batch 0: the loss must be a tensor of one number"):
        estimate(make_model(), [[{"x": 1}]], loss_fn=lambda model, batch: 1.0)
