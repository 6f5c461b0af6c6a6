"""ChildTuningTrainer says of scores and losses what from_scores and estimate_fisher say, and with options it has."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from trainer_runs import D, make_model, make_trainer

from childtune_fast.integrations.transformers import ChildTuningConfig

TRAIN_MODE = dataclasses.replace(D, train_mode=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.left = nn.Linear(8, 8), nn.Linear(8, 8)


class Model(nn.Module):
    """Blocks of two layers, of which the loss reaches one; and what its outputs are in both modes."""

    def __init__(self, training, evaluation=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.outputs = {True: training, False: evaluation or training}

    def forward(self, x, labels):
        for block in self.blocks:
            x = torch.tanh(block.used(x))
        loss = nn.functional.cross_entropy(x, labels)
        return self.outputs[self.training](loss, x)


def data():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(8, generator=generator), "labels": i % 3} for i in range(12)]


def begin(folder, model, config=D, **options):
    trainer = make_trainer(folder, config, model=model, data=data(), **options)
    trainer.create_optimizer()
    return trainer.child_network


def with_loss(loss, logits):
    return {"loss": loss, "logits": logits}


def test_kept_zeros_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="4 tensors score 0 as a whole: 'blocks.0.left.weight'"):
        begin(tmp_path, Model(with_loss), ChildTuningConfig(mode="D", reserve_p=0.6))
    assert begin(tmp_path, Model(with_loss))


def test_zeros_alone_are_refused(tmp_path):
    """The head is trained, and the blocks are not reached."""

    class Behind(Model):
        def __init__(self):
            super().__init__(with_loss)
            self.head = nn.Linear(8, 3)

        def forward(self, x, labels):
            with torch.no_grad():
                x = super().forward(x, labels)["logits"]
            return {"loss": nn.functional.cross_entropy(self.head(x), labels)}

    with pytest.raises(ValueError, match=r"the scored weights must change the loss .* look for no_grad"):
        begin(tmp_path, Behind())


@pytest.mark.parametrize(
    "evaluation",
    [lambda loss, logits: [{"boxes": logits}], lambda loss, logits: {"logits": logits}],
    ids=["a list", "no loss"],
)
def test_a_loss_in_training_mode_only(tmp_path, evaluation):
    with pytest.raises(
        ValueError, match=r"in evaluation mode the model must compute its loss .*; pass train_mode=True"
    ):
        begin(tmp_path, Model(with_loss, evaluation))
    assert begin(tmp_path, Model(with_loss, evaluation), TRAIN_MODE)


def test_several_losses(tmp_path):
    model = Model(lambda loss, logits: {"loss_a": loss, "loss_b": 2 * loss})
    with pytest.raises(ValueError, match=r"one loss, named loss \(got loss_a,loss_b\); override compute_loss"):
        begin(tmp_path, model)
    with pytest.raises(ValueError, match="in evaluation mode the model must compute its loss"):
        begin(tmp_path, Model(with_loss, model.outputs[False]))


def test_a_tuple_is_taken_as_trainer_takes_it(tmp_path):
    torch.manual_seed(0)
    model = Model(lambda loss, logits: (loss, logits))
    child = begin(tmp_path, model)
    model.outputs = dict.fromkeys(model.outputs, with_loss)
    assert begin(tmp_path, model).fingerprint == child.fingerprint


def test_examples_that_are_not_collated(tmp_path):
    with pytest.raises(TypeError, match=r"got a list of 4 mappings\); give the DataLoader a collate_fn"):
        begin(tmp_path, Model(with_loss), data_collator=lambda examples: examples)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in transformers; PEFT reads it
def test_adapters_are_warned_of_once(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    tuned = peft.get_peft_model(make_model(), config)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer(tmp_path, D, model=tuned).create_optimizer()
        assert sum("got adapters in 8 of 8 tensors" in str(warning.message) for warning in found) == 1
        found.clear()
        make_trainer(tmp_path, dataclasses.replace(D, maskable="lora_B"), model=tuned).create_optimizer()
        assert not [warning for warning in found if "ChildNetwork" in str(warning.message)]
