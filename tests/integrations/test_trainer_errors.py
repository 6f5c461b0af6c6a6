"""What ChildTuningConfig and ChildTuningTrainer refuse, and the sentences that say so."""

import dataclasses

import pytest
import torch
from processes import python, result_of
from trainer_runs import BOTH, D, F, make_data, make_model, make_trainer

from childtune_fast import ChildAdamW
from childtune_fast.integrations import mixin
from childtune_fast.integrations.transformers import ChildTuningConfig


@pytest.mark.parametrize("mode", ["f", "d", "Child-Tuning_D", "", None, 1])
def test_an_unknown_mode_never_runs(mode):
    with pytest.raises(ValueError, match=r"mode must be 'F' or 'D' \(got "):
        ChildTuningConfig(mode=mode)


def test_the_mode_must_be_given_by_name():
    with pytest.raises(TypeError, match="mode"):
        ChildTuningConfig()
    with pytest.raises(TypeError, match="positional"):
        ChildTuningConfig("F")


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, 30, float("nan")])
@pytest.mark.parametrize("mode", BOTH)
def test_reserve_p_outside_its_range(mode, p):
    with pytest.raises(ValueError, match=r"reserve_p, the share of weights .* must lie in \(0, 1\]"):
        ChildTuningConfig(mode=mode, reserve_p=p)


@pytest.mark.parametrize(
    "options",
    [
        {"fisher_batches": 3},
        {"per_example": True},
        {"grad_clip": 1.0},
        {"train_mode": True},
        {"on_nonfinite": "skip"},
        {"scope": "tensor"},
        {"maskable": "layer"},
        {"refresh_every": "epoch"},
    ],
    ids=str,
)
def test_an_option_of_d_with_f(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name} must be left out with mode='F'.*\(got .*\); mode='D' does"):
        ChildTuningConfig(mode="F", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "D", "seed": 3}, ValueError, r"seed must be left out with mode='D'.*\(got 3\); mode='F' does"),
        ({"mode": "F", "seed": "3"}, TypeError, "seed must be an integer of 64 bits"),
        ({"mode": "F", "decay": "child"}, ValueError, "decay='child' needs mode='D'"),
        ({"mode": "D", "decay": "none"}, ValueError, r"decay must be 'auto' or 'all' or 'child' \(got 'none'\)"),
        ({"mode": "D", "variant": "HF"}, ValueError, r"variant must be 'torch' or 'hf' \(got 'HF'\)"),
        ({"mode": "F", "state": "4bit"}, ValueError, r"state must be 'float32' or 'bfloat16' or '8bit' \(got '4bit'\)"),
        ({"mode": "D", "rounding": "up"}, ValueError, r"rounding must be 'nearest' or 'stochastic' \(got 'up'\)"),
        ({"mode": "D", "scope": "layer"}, ValueError, r"scope must be 'global' or 'tensor' \(got 'layer'\)"),
        ({"mode": "D", "on_nonfinite": "warn"}, ValueError, r"on_nonfinite must be 'raise' or 'skip' \(got 'warn'\)"),
        ({"mode": "D", "refresh_every": 1}, ValueError, r"refresh_every must be None or 'epoch' \(got 1\)"),
        ({"mode": "D", "fisher_batches": 0}, ValueError, r"fisher_batches must be a whole number above 0.*\(got 0\)"),
        ({"mode": "D", "fisher_batches": 0.5}, ValueError, r"fisher_batches must be a whole number.*\(got 0.5\)"),
        ({"mode": "D", "grad_clip": 0}, ValueError, r"grad_clip must be a number above 0.*\(got 0\)"),
        ({"mode": "D", "per_example": "no"}, TypeError, r"per_example must be True or False \(got 'no'\)"),
        ({"mode": "D", "maskable": "("}, ValueError, "maskable must be a regular expression"),
        ({"mode": "D", "maskable": 3}, TypeError, "maskable must be a predicate"),
    ],
    ids=str,
)
def test_options_out_of_their_ranges(options, error, message):
    with pytest.raises(error, match=message):
        ChildTuningConfig(**options)


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        F.mode = "D"


@pytest.mark.parametrize("config", ["D", {"mode": "D"}, ChildTuningConfig])
def test_child_tuning_of_another_kind(tmp_path, config):
    with pytest.raises(TypeError, match=r"child_tuning must be a ChildTuningConfig, or a function .* \(got "):
        make_trainer(tmp_path, config)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_of_ones_own(tmp_path, given):
    model = make_model()
    values = {"optimizers": (torch.optim.SGD(model.parameters()), None), "optimizer_cls_and_kwargs": (ChildAdamW, {})}
    with pytest.raises(ValueError, match="optimizers and optimizer_cls_and_kwargs must be left out"):
        make_trainer(tmp_path, D, model=model, **{given: values[given]})


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit"])
def test_another_kind_of_optimizer(tmp_path, config, optim):
    """Even one whose package is not installed: installing it would not help."""
    trainer = make_trainer(tmp_path, config, arguments_={"optim": optim})
    with pytest.raises(ValueError, match=rf"optim=\) must be one of torch's AdamW.*{optim}.*leave it out"):
        trainer.train()


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_data_without_labels(tmp_path, config):
    data = [{"input_ids": example["input_ids"]} for example in make_data()]
    with pytest.raises(ValueError, match=r"batches must have labels, .*'labels'.*\(got input_ids\); add them"):
        make_trainer(tmp_path, config, data=data).train()


def test_labels_under_another_name(tmp_path):
    data = [{"input_ids": example["input_ids"], "target": example["labels"]} for example in make_data()]
    with pytest.raises(ValueError, match=r"\(got input_ids\); add them to the data, or rename their column"):
        make_trainer(tmp_path, D, data=data).train()


def test_an_error_of_the_model_with_labels_is_its_own(tmp_path):
    data = [{"input_ids": example["input_ids"], "labels": [0, 1]} for example in make_data()]
    with pytest.raises(ValueError, match="batch_size"):
        make_trainer(tmp_path, D, data=data).train()


def test_nothing_maskable_is_said_before_the_estimation(tmp_path):
    class Unread(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            raise AssertionError("read")

    with pytest.raises(ValueError, match=r"maskable must match parameters.*'no such.*matches none.*the model has"):
        make_trainer(tmp_path, ChildTuningConfig(mode="D", maskable="no such name"), data=Unread()).train()


def test_a_batch_that_is_not_finite_is_named(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="batch 0: the loss must be finite"):
        make_trainer(tmp_path, D, model=model).train()


def test_refreshing_float16(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="D", refresh_every="epoch"))
    monkeypatch.setattr(trainer.args, "fp16", True)
    with pytest.raises(ValueError, match=r"fp16 must be False .* with refresh_every \(got True\).*use bf16=True"):
        trainer._check_supported()


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_parameters(tmp_path, monkeypatch, flag):
    for config in (F, D):
        trainer = make_trainer(tmp_path, config)
        monkeypatch.setattr(trainer, flag, True)
        if config is F:
            trainer._check_supported()
        else:
            got = "DeepSpeed" if "deepspeed" in flag else "FSDP version 1"
            with pytest.raises(ValueError, match=rf"mode='D' needs whole parameters or .*got {got}.*use FSDP2, by"):
                trainer._check_supported()


def test_float16_on_shards(tmp_path, monkeypatch):
    """The scores are then of the shards' own precision, and there is no GradScaler for them."""
    monkeypatch.setattr(mixin, "is_fsdp2", lambda trainer: True)
    for config in (F, D):
        trainer = make_trainer(tmp_path, config)
        monkeypatch.setattr(trainer.args, "fp16", True)
        if config is F:
            trainer._check_supported()
        else:
            with pytest.raises(ValueError, match=r"fp16 must be False with FSDP2 in mode='D'.*\(got True\).*use bf16"):
                trainer._check_supported()


def test_refreshing_without_epochs(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data())

    options = {"data": Stream(), "arguments_": {"max_steps": 2}}
    with pytest.raises(ValueError, match=r"needs a training set with a length.*\(got Stream\); leave it None"):
        make_trainer(tmp_path, ChildTuningConfig(mode="D", refresh_every="epoch"), **options).train()
    make_trainer(tmp_path, D, **options).train()


def test_the_core_needs_no_transformers_and_the_integration_says_that_it_does():
    code = """
import sys
sys.modules["transformers"] = None
import childtune_fast
try:
    import childtune_fast.integrations.transformers
except ImportError as error:
    print(error)
"""
    printed, _ = result_of(python(code))
    assert "needs transformers 4.47 or newer, and accelerate" in printed
    assert "pip install 'childtune-fast[transformers]'" in printed
