"""load_best_model_at_end: the child network that comes with the best checkpoint's weights is that checkpoint's own."""

import os
import shutil

import pytest
import transformers
from helpers import _same, same_bits
from safetensors.torch import load_file
from trainer_runs import BEST_IS_SECOND, REFRESHED, D, F, make_best, make_model, optimizer_of, states_of, weights
from transformers import TrainerCallback

from childtune_fast import ChildNetwork
from childtune_fast.integrations import mixin, scores
from childtune_fast.integrations.transformers import CHILD_FILE
from childtune_fast.ops.packed_mask import fingerprint

EVERY_STEP = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}


def assert_all_of(trainer, moment, child, folder):
    """Asserts that model, child network, optimizer and what is saved are of one moment."""
    trainer.save_model(str(folder / "model"))
    for name, param in trainer.model.named_parameters():
        assert same_bits(param, moment[name]), name
    assert trainer.child_network.fingerprint == child.fingerprint
    assert fingerprint(optimizer_of(trainer).child_masks.values()) == child.fingerprint
    for saved in (folder / "model", folder / "at the end"):
        assert ChildNetwork.load(saved / CHILD_FILE, trainer.model).fingerprint == child.fingerprint
        for name, tensor in load_file(saved / "model.safetensors").items():
            assert same_bits(tensor, moment[name]), name


@pytest.mark.parametrize(
    "options", [{}, {"save_total_limit": 1}, {"save_only_model": True}, {"save_strategy": "best"}], ids=str
)
def test_the_best_checkpoints_child_network_comes_with_its_weights(tmp_path, options):
    if "save_strategy" in options and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("Trainer wants save_strategy and eval_strategy to be the same")
    trainer, notes = make_best(tmp_path, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert len({child.fingerprint for child in notes.children}) == 3
    assert_all_of(trainer, notes.weights[1], notes.children[1], tmp_path)
    of_the_best = ChildNetwork.load(tmp_path / "checkpoint-6" / CHILD_FILE, trainer.model)
    assert trainer.child_network.fingerprint == of_the_best.fingerprint


def test_the_saved_child_network_is_the_one_that_trained_the_saved_weights(tmp_path):
    """Outside of it they are as the epoch before left them, and the last child network would not say so."""
    trainer, notes = make_best(tmp_path)
    trainer.train()
    before, saved = notes.weights[0], load_file(tmp_path / "at the end" / "model.safetensors")

    def moved_outside(child):
        return sum((saved[name] != before[name])[~mask].sum().item() for name, mask in child.masks().items())

    assert moved_outside(ChildNetwork.load(tmp_path / "at the end" / CHILD_FILE, trainer.model)) == 0
    assert moved_outside(notes.children[2]) > 0


@pytest.mark.parametrize("config", [REFRESHED, D, F], ids=["D refreshed", "D", "F"])
def test_the_optimizer_keeps_its_state_where_the_child_network_stays(tmp_path, config):
    """The best is the last, or there is one child network all along, or none."""
    metrics = (0, 1, 2) if config is REFRESHED else BEST_IS_SECOND
    trainer, notes = make_best(tmp_path, config, metrics)
    trainer.train()
    assert trainer.child_network is notes.children[2]
    assert _same(states_of(trainer), notes.states[2])
    assert (tmp_path / "at the end" / CHILD_FILE).exists() == (config is not F)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run with a checkpoint after each of its nine steps, of which the third is the best."""
    trainer, _ = make_best(tmp_path_factory.mktemp("run"), metrics=(0, 0, 2, 1, 1, 1, 1, 1, 1), **EVERY_STEP)
    trainer.train()
    return trainer.args.output_dir


@pytest.mark.parametrize(
    ("config", "step"),
    [(REFRESHED, 6), (REFRESHED, 7), (REFRESHED, 9), (D, 6)],
    ids=["between two epochs", "amid the last", "when all is done", "no longer refreshed"],
)
def test_the_best_checkpoint_may_lie_before_the_resume(tmp_path, interrupted, config, step):
    trainer, notes = make_best(tmp_path, config, [1] * 3, make_model(seed=9), **EVERY_STEP)
    trainer.train(f"{interrupted}/checkpoint-{step}")
    best = f"{interrupted}/checkpoint-3"
    assert trainer.state.best_model_checkpoint == best
    child = ChildNetwork.load(f"{best}/{CHILD_FILE}", trainer.model)
    assert all(other.fingerprint != child.fingerprint for other in notes.children)
    assert_all_of(trainer, load_file(f"{best}/model.safetensors"), child, tmp_path)


def test_another_training_goes_on_from_the_best_and_can_be_resumed(tmp_path, monkeypatch):
    trainer, notes = make_best(tmp_path, metrics=BEST_IS_SECOND * 2)
    trainer.train()
    trainer.train()
    assert notes.children[3].fingerprint == notes.children[1].fingerprint
    assert_all_of(trainer, notes.weights[4], notes.children[4], tmp_path)
    monkeypatch.setattr(scores, "estimate_fisher", None)
    resumed, _ = make_best(tmp_path, D, model=make_model(seed=9), save_strategy="no", load_best_model_at_end=False)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert resumed.child_network.fingerprint == notes.children[3].fingerprint


@pytest.mark.parametrize("lost", ["the child network", "the checkpoint"])
def test_a_best_checkpoint_that_has_been_deleted(tmp_path, monkeypatch, lost):
    """Trainer warns of the weights and keeps the last; so it is with the child network."""

    class Loses(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == 2:
                folder = tmp_path / "checkpoint-6"
                os.remove(folder / CHILD_FILE) if lost == "the child network" else shutil.rmtree(folder)

    said = []
    monkeypatch.setattr(mixin.logger, "warning", said.append)
    trainer, notes = make_best(tmp_path)
    trainer.add_callback(Loses())
    trainer.train()
    path = tmp_path / "checkpoint-6" / CHILD_FILE
    assert said == [f"Not every process finds '{path}', so that the child network stays that of the last step"]
    assert trainer.child_network is notes.children[2]
    assert _same(weights(trainer.model), notes.weights[1 if lost == "the child network" else 2])


def test_no_evaluation_and_so_no_best(tmp_path, monkeypatch):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    monkeypatch.setattr(mixin.logger, "warning", None)
    trainer, notes = make_best(tmp_path, **{**EVERY_STEP, "eval_steps": 2, "save_steps": 2})
    trainer.add_callback(Stops())
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert trainer.child_network is notes.children[0]
