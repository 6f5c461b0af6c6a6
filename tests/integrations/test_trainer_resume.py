"""Checkpoints of trainers with ChildAdamW: a run that is resumed equals one that was not interrupted, bit for bit."""

import json
import shutil

import pytest
import torch
from helpers import _same
from trainer_runs import BOTH, D, F, make_model, make_trainer, optimizer_of, states_of, weights
from transformers import Trainer

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.integrations import scores
from childtune_fast.integrations.transformers import CHILD_FILE, ChildTuningConfig, ChildTuningTrainer

REFRESHED = ChildTuningConfig(mode="D", refresh_every="epoch", fisher_batches=2, train_mode=True)
CONFIGS = {"F": F, "D": D, "D refreshed": REFRESHED}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
LAST = 9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trainers that have trained, and left a checkpoint after each step, by configuration."""
    trained = {}
    for name, config in CONFIGS.items():
        trained[name] = make_trainer(tmp_path_factory.mktemp(f"run{len(trained)}"), config, arguments_=EVERY_STEP)
        trained[name].train()
    return trained


def checkpoint(trainer, step):
    return f"{trainer.args.output_dir}/checkpoint-{step}"


def assert_same_end(a, b):
    for (name, x), y in zip(weights(a.model).items(), weights(b.model).values(), strict=True):
        assert _same(x, y), name
    assert _same(states_of(a), states_of(b))
    assert _same(a.lr_scheduler.state_dict()["_last_lr"], b.lr_scheduler.state_dict()["_last_lr"])
    assert a.state.global_step == b.state.global_step == LAST


@pytest.mark.parametrize("step", [1, 3, 5])  # amid the first epoch, between two, amid the second
@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, name, step):
    if name == "D":  # takes the child network from the checkpoint
        monkeypatch.setattr(scores, "estimate_fisher", None)
    options = {"arguments_": {**EVERY_STEP, "save_strategy": "no"}, "model": make_model(seed=9)}
    resumed = make_trainer(tmp_path, CONFIGS[name], **options)
    torch.rand(7)  # a new process has drawn other numbers before
    resumed.train(checkpoint(uninterrupted[name], step))
    assert_same_end(resumed, uninterrupted[name])
    if name != "F":
        assert resumed.child_network.fingerprint == uninterrupted[name].child_network.fingerprint


@pytest.mark.parametrize("name", BOTH)
def test_trainer_alone_resumes_too(tmp_path, uninterrupted, name):
    def trainer(folder, seed):
        model = make_model(seed=seed)
        options = {"lr": 1e-2, "seed": 3}
        if name == "D":
            masks = uninterrupted["D"].child_network.masks()
            options = {"lr": 1e-2, "child": ChildNetwork.from_masks(model, masks)}
        return make_trainer(
            tmp_path / folder,
            None,
            model=model,
            trainer=Trainer,
            optimizer_cls_and_kwargs=(ChildAdamW, options),
            arguments_={**EVERY_STEP, "save_steps": 4},
        )

    whole = trainer("whole", 0)
    whole.train()
    resumed = trainer("resumed", 9)
    resumed.train(checkpoint(whole, 4))
    assert_same_end(resumed, whole)


def test_the_child_network_is_in_every_checkpoint_and_beside_a_saved_model(tmp_path, uninterrupted):
    trainer = uninterrupted["D refreshed"]
    of_steps = [ChildNetwork.load(f"{checkpoint(trainer, i)}/{CHILD_FILE}", trainer.model) for i in range(1, LAST + 1)]
    fingerprints = [child.fingerprint for child in of_steps]
    assert [len(set(fingerprints[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(fingerprints)) == 3
    trainer.save_model(str(tmp_path / "model"))
    saved = ChildNetwork.load(tmp_path / "model" / CHILD_FILE, trainer.model)
    assert saved.fingerprint == trainer.child_network.fingerprint == fingerprints[-1]
    again = type(trainer.model).from_pretrained(tmp_path / "model")
    assert all(map(torch.equal, weights(again).values(), weights(trainer.model).values()))


def test_f_writes_no_child_network(tmp_path, uninterrupted):
    uninterrupted["F"].save_model(str(tmp_path))
    assert not (tmp_path / CHILD_FILE).exists()
    assert (tmp_path / "config.json").exists()


def test_true_takes_the_last_checkpoint(tmp_path, monkeypatch, uninterrupted):
    shutil.copytree(checkpoint(uninterrupted["D"], 2), tmp_path / "checkpoint-2")
    shutil.copytree(checkpoint(uninterrupted["D"], 4), tmp_path / "checkpoint-4")
    monkeypatch.setattr(scores, "estimate_fisher", None)
    resumed = make_trainer(tmp_path, D, arguments_={**EVERY_STEP, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, uninterrupted["D"])


def test_true_without_a_checkpoint_is_trainers_own_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        make_trainer(tmp_path, D).train(resume_from_checkpoint=True)


def test_a_trainer_that_went_on_resumes_from_an_earlier_child_network(uninterrupted, tmp_path):
    trainer = make_trainer(tmp_path, REFRESHED, arguments_=EVERY_STEP)
    trainer.train()
    trainer.train(resume_from_checkpoint=checkpoint(trainer, 2))
    assert_same_end(trainer, uninterrupted["D refreshed"])


def test_a_checkpoint_of_the_model_alone_goes_on_with_its_child_network(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    first = make_trainer(tmp_path, D, arguments_=options)
    first.train()
    monkeypatch.setattr(scores, "estimate_fisher", None)
    resumed = make_trainer(tmp_path, D, model=make_model(seed=9), arguments_=options)
    resumed.train(checkpoint(first, 3))
    assert resumed.child_network.fingerprint == first.child_network.fingerprint


@pytest.mark.parametrize(
    ("config", "of", "message"),
    [
        (F, "D", r"mode='F' must resume from a checkpoint without a child network \(got '.*child.safetensors'\)"),
        (D, "F", r"mode='D' must resume from a checkpoint with its child network \(got no '.*child.safetensors'\)"),
    ],
    ids=["F from D", "D from F"],
)
def test_the_other_mode_does_not_resume(tmp_path, uninterrupted, config, of, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, config).train(checkpoint(uninterrupted[of], 3))


def test_a_child_network_that_is_not_the_optimizers_is_refused(tmp_path, uninterrupted):
    """A checkpoint that somebody put together from two."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint(uninterrupted["D refreshed"], 3), folder)
    shutil.copy(f"{checkpoint(uninterrupted['D refreshed'], 4)}/{CHILD_FILE}", folder)
    with pytest.raises(ValueError, match="the optimizer's child network must be the checkpoint's"):
        make_trainer(tmp_path, REFRESHED).train(str(folder))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    options = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    trainer = make_trainer(tmp_path, D, arguments_=options, eval_dataset=make_trainer(tmp_path, D).train_dataset)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    with open(f"{best}/trainer_state.json") as file:
        assert json.load(file)["best_metric"] == trainer.state.best_metric
    assert ChildNetwork.load(f"{best}/{CHILD_FILE}", trainer.model).fingerprint == trainer.child_network.fingerprint
    assert isinstance(optimizer_of(trainer), ChildAdamW)
    assert isinstance(trainer, ChildTuningTrainer)


def test_f_leaves_no_child_network_of_an_earlier_run_beside_its_weights(tmp_path):
    of_d = make_trainer(tmp_path, D, arguments_={"max_steps": 1})
    of_d.train()
    of_d.save_model()
    make_trainer(tmp_path, D).save_model()  # which has not chosen one: as after an evaluation
    assert (tmp_path / CHILD_FILE).exists()
    make_trainer(tmp_path, F).save_model()
    assert not (tmp_path / CHILD_FILE).exists()
