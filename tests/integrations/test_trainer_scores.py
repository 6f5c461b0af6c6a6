"""ChildTuningTrainer's Fisher scores: of the loss and in the precision of the training, and as the options say."""

import copy

import pytest
import torch
from trainer_runs import EXAMPLES, D, make_data, make_model, make_trainer

from childtune_fast import ChildNetwork
from childtune_fast.integrations import scores
from childtune_fast.integrations.transformers import ChildTuningConfig, ChildTuningTrainer

REFRESHED = ChildTuningConfig(mode="D", refresh_every="epoch")


def squares(model, loss_of, batch):
    """The squared gradients of one batch, without dropout."""
    model = copy.deepcopy(model).eval()
    loss_of(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]).backward()
    return {name: p.grad.square() for name, p in model.named_parameters()}


def twice_the_first_class(outputs, labels, num_items_in_batch):
    losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (losses * (1 + (labels == 0))).sum() / num_items_in_batch


@pytest.mark.parametrize("loss", ["the model's", "smoothed", "a function"])
def test_scores_are_of_the_loss_that_is_trained_with(tmp_path, loss):
    """One batch of the whole training set, so that its order matters only to rounding."""
    model, data = make_model(), make_data()
    with torch.no_grad():
        model.classifier.weight *= 100  # else it knows nothing, and smoothing only scales the gradients
    options = {"compute_loss_func": twice_the_first_class} if loss == "a function" else {}
    size = {"per_device_train_batch_size": EXAMPLES, "label_smoothing_factor": 0.4 * (loss == "smoothed")}
    trainer = make_trainer(tmp_path, D, model=model, data=data, arguments_=size, **options)

    def reference(logits, labels):
        if loss == "a function":
            return twice_the_first_class(type("", (), {"logits": logits}), labels, len(labels))
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.4 * (loss == "smoothed"))

    batch = {key: torch.tensor([example[key] for example in data]) for key in data[0]}
    scores = squares(model, reference, batch)
    trainer.create_optimizer()
    assert trainer.child_network.overlap(ChildNetwork.from_scores(model, scores, reserve_p=0.3)) > 0.995
    if loss != "the model's":
        usual = squares(model, torch.nn.functional.cross_entropy, batch)
        assert trainer.child_network.overlap(ChildNetwork.from_scores(model, usual, reserve_p=0.3)) < 0.995


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fisher_batches": 1}, {"max_batches": 1}),
        ({"grad_clip": 1.0, "train_mode": True}, {"grad_clip": 1.0, "train_mode": True}),
        ({"per_example": True}, {"per_example": True}),
        ({"on_nonfinite": "skip"}, {"on_nonfinite": "skip"}),
    ],
    ids=str,
)
def test_options_of_the_estimation_reach_it(tmp_path, monkeypatch, options, expected):
    seen = {}

    def spy(model, batches, **given):
        seen.update(given)
        return estimate(model, batches, **given)

    estimate = scores.estimate_fisher
    monkeypatch.setattr(scores, "estimate_fisher", spy)
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="D", **options))
    state = trainer.accelerator.gradient_state
    before = state.active_dataloader
    trainer.create_optimizer()
    assert expected.items() <= seen.items()
    assert state.active_dataloader is before  # also where the estimation ended early


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")
def test_scores_are_computed_in_the_precision_of_the_training(tmp_path, monkeypatch, bf16):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    seen = []

    class Watching(torch.nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            seen.append(outputs.dtype)
            return outputs

    model = make_model()
    model.classifier = Watching(16, 3)
    make_trainer(tmp_path, REFRESHED, model=model, arguments_={"bf16": bf16}).train()
    assert len(seen) == 12  # three batches in each of two estimations and of two epochs
    assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}


def test_options_of_the_choice_reach_it(tmp_path):
    config = ChildTuningConfig(mode="D", reserve_p=0.1, scope="tensor", maskable="query", decay="all", variant="hf")
    trainer = make_trainer(tmp_path, config)
    trainer.train()
    masks = trainer.child_network.masks()
    assert masks
    assert all("query" in name and mask.sum() == round(0.1 * mask.numel()) for name, mask in masks.items())
    assert all((g["decay"], g["variant"]) == ("all", "hf") for g in trainer.optimizer.param_groups)


@pytest.mark.filterwarnings("error:estimate_fisher")
def test_scores_of_examples_from_one_backward_pass_of_a_batch(tmp_path):
    """With the loss of Trainer, in batches of four, against batches of one example."""
    chosen = []
    for options, size in (({"per_example": True}, 4), ({}, 1)):
        arguments = {"per_device_train_batch_size": size, "label_smoothing_factor": 0.1}
        trainer = make_trainer(tmp_path, ChildTuningConfig(mode="D", **options), arguments_=arguments)
        trainer.create_optimizer()
        chosen.append(trainer.child_network)
    assert chosen[0].overlap(chosen[1]) > 0.999


def adversarial(model, batch):
    """The loss of the batch, and that of embeddings moved along their gradient, as in FGM."""
    loss = model(**batch).loss
    loss.backward()
    weight = model.get_input_embeddings().weight
    step = 0.5 * weight.grad / weight.grad.norm()
    model.zero_grad()
    with torch.no_grad():
        weight.add_(step)
    moved = model(**batch).loss
    with torch.no_grad():
        weight.sub_(step)
    return model(**batch).loss + 0 * moved.detach()


class Adversarial(ChildTuningTrainer):
    def compute_loss(self, model, inputs, *_, **__):
        return adversarial(model, inputs)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore:estimate_fisher")
def test_a_compute_loss_that_takes_backward_passes(tmp_path, per_example):
    """What they leave in `grad` is no part of the scores."""
    config = ChildTuningConfig(mode="D", per_example=per_example)
    chosen = []
    for kind in (Adversarial, ChildTuningTrainer):
        trainer = make_trainer(tmp_path, config, trainer=kind)
        trainer.create_optimizer()
        assert all(param.grad is None for param in trainer.model.parameters())
        chosen.append(trainer.child_network)
    assert chosen[0].overlap(chosen[1]) > 0.995


class Marked(ChildTuningTrainer):
    """Its loss is infinite for an example that begins with token 1."""

    def compute_loss(self, model, inputs, *arguments, **options):
        loss = super().compute_loss(model, inputs, *arguments, **options)
        return loss / (inputs["input_ids"][:, 0] != 1).all()


@pytest.mark.parametrize("per_example", [False, True])
def test_losses_that_are_not_finite(tmp_path, per_example):
    data = make_data()
    data[5]["input_ids"][0] = 1
    options = {"data": data, "trainer": Marked}
    with pytest.raises(ValueError, match="the loss must be finite"):
        make_trainer(tmp_path, ChildTuningConfig(mode="D", per_example=per_example), **options).create_optimizer()
    config = ChildTuningConfig(mode="D", per_example=per_example, on_nonfinite="skip")
    where = r"1 of 12 .*: batch \d, example \d$" if per_example else r"1 of 3 .*: batch \d$"
    trainer = make_trainer(tmp_path, config, **options)
    with pytest.warns(UserWarning, match=where):
        trainer.create_optimizer()
    if per_example:
        rest = make_trainer(tmp_path, ChildTuningConfig(mode="D", per_example=True), data=data[:5] + data[6:])
        rest.create_optimizer()
        assert trainer.child_network.overlap(rest.child_network) > 0.999
