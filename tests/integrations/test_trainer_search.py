"""Trainer.hyperparameter_search over options of Child-Tuning, by optuna; and what would silently change nothing."""

import pytest
import torch
from trainer_runs import D, F, make_data, make_model, make_trainer
from transformers import TrainerCallback

from childtune_fast.integrations.transformers import ChildTuningConfig

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Notes(TrainerCallback):
    """What each training of a trainer was with."""

    def __init__(self):
        self.configs, self.shares, self.objectives = [], [], []

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        child = self.trainer.child_network
        group = getattr(optimizer, "optimizer", optimizer).param_groups[0]
        self.configs.append(self.trainer.child_tuning)
        self.shares.append(group["reserve_p"] if child is None else round(child.summary().total.density, 2))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.objectives.append(metrics["eval_loss"])


def searching(folder, config, model_init, **options):
    """A trainer of one epoch with an evaluation at its end, and its notes."""
    notes = Notes()
    notes.trainer = make_trainer(
        folder,
        config,
        model_init=model_init,
        eval_dataset=make_data(examples=4, seed=1),
        arguments_={"num_train_epochs": 1, "eval_strategy": "epoch", **options},
        callbacks=[notes],
    )
    return notes.trainer, notes


def search(trainer, **grid):
    """Tries every value of one hyperparameter."""
    ((name, values),) = grid.items()
    sampler = optuna.samplers.GridSampler(grid)
    return trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values)},
        n_trials=len(values),
        backend="optuna",
        sampler=sampler,
    )


def new_model():  # make_model takes arguments, and so would be given the trial
    return make_model()


@pytest.mark.parametrize("config", [F, D], ids=["F", "D"])
def test_trials_have_the_share_that_is_tried(tmp_path, config, caplog):
    trainer, notes = searching(tmp_path, config, new_model)
    best = search(trainer, reserve_p=[0.1, 0.5])
    assert sorted(notes.shares) == [0.1, 0.5]
    assert trainer.child_tuning == config  # as it was
    assert best.objective == min(notes.objectives)
    assert best.hyperparameters == {"reserve_p": notes.shares[notes.objectives.index(best.objective)]}
    assert "no corresponding field" not in caplog.text

    for share, objective in zip(notes.shares, notes.objectives, strict=True):
        alone, of_one = searching(tmp_path, ChildTuningConfig(mode=config.mode, reserve_p=share), new_model)
        alone.train()
        assert of_one.objectives == [objective]


def test_a_trial_may_choose_the_mode(tmp_path):
    trainer, notes = searching(tmp_path, ChildTuningConfig(mode="F", reserve_p=0.25), new_model, save_strategy="epoch")
    search(trainer, mode=["D", "F", "D"])
    assert sorted(config.mode for config in notes.configs) == ["D", "D", "F"]
    for number, config in enumerate(notes.configs):
        assert config.reserve_p == 0.25
        assert bool(list(tmp_path.glob(f"run-{number}/*/child.safetensors"))) == (config.mode == "D")


@pytest.mark.parametrize("base", [ChildTuningConfig(mode="F", seed=3), ChildTuningConfig(mode="D", fisher_batches=2)])
def test_options_of_the_other_mode_do_not_hinder_a_trial(tmp_path, base):
    trainer, notes = searching(tmp_path, base, new_model)
    search(trainer, mode=["F", "D"])
    assert base in notes.configs
    assert {config.mode for config in notes.configs} == {"F", "D"}
    assert ChildTuningConfig(mode="D", decay="child").changed({"mode": "F"}).decay == "auto"
    assert ChildTuningConfig(mode="D", decay="all").changed({"mode": "F"}).decay == "all"
    with pytest.raises(ValueError, match="fisher_batches must be left out with mode='F'"):
        base.changed({"mode": "F", "fisher_batches": 1})


def test_the_others_are_trainers(tmp_path):
    trainer, notes = searching(tmp_path, ChildTuningConfig(mode="F", seed=5), new_model)
    search(trainer, seed=[11, 12])  # of TrainingArguments
    assert trainer.args.seed in (11, 12)
    assert [config.seed for config in notes.configs] == [5, 5]


def test_the_configuration_may_be_a_function_of_the_trial(tmp_path):
    def of_trial(trial):
        if trial is None:
            return F
        return ChildTuningConfig(mode="D", reserve_p=0.4 if trial.suggest_categorical("much", [True, False]) else 0.2)

    trainer, notes = searching(tmp_path, of_trial, new_model)
    assert trainer.child_tuning == F
    sampler = optuna.samplers.GridSampler({"much": [True, False]})
    best = trainer.hyperparameter_search(lambda trial: {}, n_trials=2, backend="optuna", sampler=sampler)
    assert sorted(notes.shares) == [0.2, 0.4]
    assert set(best.hyperparameters) == {"much"}
    assert trainer.child_tuning == F


def test_options_given_to_a_search_win_over_the_functions(tmp_path):
    trainer, notes = searching(tmp_path, lambda trial: F, new_model)
    search(trainer, reserve_p=[0.5])
    assert notes.shares == [0.5]


@pytest.mark.parametrize(("name", "word"), [("reserve", "'reserve'"), ("reserveP", "'reserveP'")])
def test_a_name_that_nothing_has(tmp_path, name, word):
    trainer, notes = searching(tmp_path, F, new_model)
    with pytest.raises(
        ValueError, match=rf"hp_space must name fields of .*reserve_p.*\(got {word}, which would change"
    ):
        search(trainer, **{name: [0.1]})
    assert notes.configs == []
    assert trainer.child_tuning == F


def test_a_name_that_the_model_may_read(tmp_path):
    trainer, notes = searching(tmp_path, F, lambda trial: make_model())
    search(trainer, dropout=[0.1, 0.2])
    assert notes.configs == [F, F]


def test_a_value_that_the_option_cannot_have(tmp_path):
    trainer, _ = searching(tmp_path, F, new_model)
    with pytest.raises(ValueError, match=r"reserve_p, the share of weights .* must lie in \(0, 1\]"):
        search(trainer, reserve_p=[30])
    with pytest.raises(ValueError, match="scope must be left out with mode='F'"):
        search(trainer, scope=["tensor"])
    assert trainer.child_tuning == F


def test_a_combination_that_cannot_be_honoured(tmp_path):
    trainer, _ = searching(tmp_path, ChildTuningConfig(mode="D"), new_model)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match=r"fp16 must be False .* with refresh_every"):
        search(trainer, refresh_every=["epoch"])


def test_an_option_set_on_the_arguments(tmp_path):
    """As one sets what the best trial had."""
    trainer, notes = searching(tmp_path, F, new_model)
    trainer.args.reserve_p = 0.1
    with pytest.raises(ValueError, match=r"TrainingArguments has no reserve_p, .*\(got 0.1\); .*dataclasses.replace"):
        trainer.train()
    assert notes.configs == []


def test_a_function_that_returns_something_else(tmp_path):
    with pytest.raises(TypeError, match=r"child_tuning must be a ChildTuningConfig, or a function .* \(got dict\)"):
        searching(tmp_path, lambda trial: {"mode": "F"}, new_model)


def test_a_pruned_trial_leaves_nothing_behind(tmp_path):
    class Prune(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise optuna.TrialPruned

    trainer, notes = searching(tmp_path, D, new_model)
    trainer.add_callback(Prune)
    with pytest.raises(ValueError, match="No trials are completed yet"):
        search(trainer, reserve_p=[0.1, 0.5])
    trainer.remove_callback(Prune)
    trainer.train()
    assert notes.shares == [0.3]
    assert torch.isfinite(torch.tensor(notes.objectives)).all()
