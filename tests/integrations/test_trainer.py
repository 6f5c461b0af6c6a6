"""ChildTuningTrainer: Trainer in everything but the optimizer, and the child network that its loss chooses."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from helpers import same_bits
from models import BERT_LIKE
from trainer_runs import (
    BOTH,
    EXAMPLES,
    D,
    F,
    Recorder,
    make_data,
    make_model,
    make_trainer,
    optimizer_of,
    weights,
)
from transformers import Trainer

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.integrations.transformers import ChildTuningConfig, ChildTuningTrainer
from childtune_fast.optimizer import kinds

REFRESHED = ChildTuningConfig(mode="D", refresh_every="epoch")
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
every_mode = pytest.mark.parametrize("config", [F, D, REFRESHED], ids=["F", "D", "D refreshed"])
f_and_d = pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)


class Noisy(torch.utils.data.Dataset):
    """Examples that draw from every global random state, as augmentation does."""

    def __init__(self):
        self.data = make_data()
        self.seen = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        draws = np.random.rand(), random.random(), torch.rand(()).item()  # noqa: NPY002
        self.seen.append((i, draws))
        return self.data[i]


@pytest.mark.parametrize("then", [ChildTuningConfig(mode="D", reserve_p=0.6), F], ids=["D", "F"])
def test_the_next_training_has_the_options_that_were_set_in_between(tmp_path, then):
    trainer = make_trainer(tmp_path, D)
    trainer.train()
    trainer.child_tuning = then
    trainer.train()
    if then.mode == "F":
        assert trainer.child_network is None
        assert optimizer_of(trainer).param_groups[0]["reserve_p"] == then.reserve_p
        trainer.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved" / "child.safetensors").exists()
    else:
        assert trainer.child_network.summary().total.density == pytest.approx(0.6, abs=1e-3)
    optimizer = trainer.optimizer
    trainer.child_tuning = dataclasses.replace(then, log_every=2)
    trainer.train()
    assert trainer.optimizer is optimizer  # which goes on


def recorded(trainer):
    """Trains, and returns what the steps began with."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def groups_of(trainer):
    names = {param: name for name, param in trainer.model.named_parameters()}
    return [
        ([names[p] for p in g["params"]], {k: g[k] for k in ("lr", "initial_lr", "weight_decay", "betas", "eps")})
        for g in trainer.optimizer.param_groups
    ]


@every_mode
def test_all_but_the_optimizer_is_as_in_trainer(tmp_path, config):
    """Warm-up, schedule, decay groups, the order of the data, every draw of dropout and augmentation."""
    plain = make_trainer(tmp_path, None, data=Noisy(), trainer=Trainer)
    expected = recorded(plain)
    ours = make_trainer(tmp_path, config, data=Noisy())  # the constructor sets the seeds
    got = recorded(ours)
    assert got.rates == expected.rates
    assert got.rates[0] == [0.0, 0.0]
    assert got.rates[2] == [1e-2, 1e-2]  # warm-up took two steps
    assert groups_of(ours) == groups_of(plain)
    assert [g[1]["weight_decay"] for g in groups_of(ours)] == [0.1, 0.0]
    for a, b in zip(got.random, expected.random, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1:] == b[1:]
    trained_on = 2 * EXAMPLES
    if config is not REFRESHED:  # which looks through the data between the epochs, too
        assert ours.train_dataset.seen[-trained_on:] == plain.train_dataset.seen
    for name, grad in got.grads[0].items():
        assert same_bits(grad, expected.grads[0][name])


@f_and_d
@pytest.mark.parametrize("options", [{}, ACCUMULATED, {"bf16": True}], ids=["plain", "accumulated", "bf16"])
@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # transformers 4 calls it
def test_the_weights_are_those_of_a_plain_loop_with_the_same_gradients(tmp_path, monkeypatch, config, options):
    """Clipping, accumulation and schedule reach the optimizer as they are."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # where transformers 4 leaves bf16 for later trainers
    model = make_model()
    begun = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, config, model=model, arguments_=options)
    run = recorded(trainer)
    assert len(run.grads) == trainer.state.global_step == 6
    norms = [torch.stack([g.norm() for g in grads.values()]).norm() for grads in run.grads]
    assert max(norms) <= 0.5 + 1e-5  # max_grad_norm, plus rounding

    if config is D:
        child = ChildNetwork.from_masks(begun, trainer.child_network.masks())
        assert begun.num_parameters() > sum(m.numel() for m in child.masks().values())
    by_name = dict(begun.named_parameters())
    names = {param: name for name, param in model.named_parameters()}
    groups = [
        {"params": [by_name[names[p]] for p in g["params"]], "weight_decay": g["weight_decay"]}
        for g in trainer.optimizer.param_groups
    ]
    optimizer = ChildAdamW(groups, **({"child": child} if config is D else {"reserve_p": 0.3, "seed": 42}))
    for rates, grads in zip(run.rates, run.grads, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, param in by_name.items():
            param.grad = grads.get(name)
        optimizer.step()
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        assert same_bits(param, by_name[name]), name


@f_and_d
def test_trainer_alone_takes_child_adamw(tmp_path, config):
    """optimizer_cls_and_kwargs is enough where scores, files and resumption are one's own matter."""
    ours = make_trainer(tmp_path, config)
    ours.train()
    model = make_model()
    options = {"lr": 1e-2, "seed": 42}
    if config is D:
        options = {"lr": 1e-2, "child": ChildNetwork.from_masks(model, ours.child_network.masks())}
    plain = make_trainer(tmp_path, None, model=model, trainer=Trainer, optimizer_cls_and_kwargs=(ChildAdamW, options))
    plain.train()
    for a, b in zip(weights(ours.model).values(), weights(model).values(), strict=True):
        assert same_bits(a, b)


def test_d_trains_its_child_network_and_nothing_else_of_the_blocks(tmp_path):
    model = make_model()
    before = weights(model)
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="D", reserve_p=0.2), model=model)
    assert trainer.child_network is None
    trainer.train()
    masks = trainer.child_network.masks()
    assert set(masks) == {name for name in before if ".layer." in name}
    assert sum(m.sum() for m in masks.values()) == round(0.2 * sum(m.numel() for m in masks.values()))
    for name, param in model.named_parameters():
        mask = masks.get(name, torch.ones_like(param, dtype=torch.bool))
        assert same_bits(param[~mask], before[name][~mask])
        assert not torch.equal(param, before[name]) or not mask.any(), name


@pytest.mark.parametrize("mode", ["F", "D"])
def test_state_and_rounding_reach_the_optimizer(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(kinds, "LEAST_NUMEL", 1)  # the model's matrices are small
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode=mode, state="8bit", rounding="stochastic"))
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert [(group["state"], group["rounding"]) for group in optimizer.param_groups] == [("8bit", "stochastic")] * 2
    assert all(state["exp_avg_codes"].dtype == torch.uint8 for state in optimizer.state.values())


@pytest.mark.parametrize(("seed", "expected"), [(None, 11), (5, 5)])
def test_the_masks_seed_of_f(tmp_path, seed, expected):
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="F", seed=seed), arguments_={"seed": 11})
    torch.manual_seed(1)
    trainer.train()
    assert optimizer_of(trainer).seed == expected


def test_refreshing_chooses_once_an_epoch_and_begins_the_masked_state_anew(tmp_path):
    seen = []

    class Watching(ChildTuningTrainer):
        def _chosen_child(self, epoch):
            child = super()._chosen_child(epoch)
            seen.append((epoch, self.state.global_step, child.fingerprint))
            return child

    trainer = make_trainer(tmp_path, REFRESHED, trainer=Watching, arguments_={"num_train_epochs": 3})
    trainer.train()
    assert [entry[:2] for entry in seen] == [(0, 0), (1, 3), (2, 6)]
    assert len({entry[2] for entry in seen}) == 3
    assert trainer.child_network.fingerprint == seen[-1][2]
    optimizer, masks = optimizer_of(trainer), trainer.child_network.masks()
    for name, param in trainer.model.named_parameters():
        state = optimizer.state[param]
        assert state["step"] == (3 if name in masks else 9)
        assert state["exp_avg"].numel() == (masks[name].sum() if name in masks else param.numel())


def test_a_parameter_that_never_gets_a_gradient_stays_as_it_is(tmp_path):
    model = make_model()
    model.bert.encoder.layer[0].unused = torch.nn.Linear(4, 4)
    before = weights(model)
    trainer = make_trainer(tmp_path, D, model=model)
    trainer.train()
    assert not any(mask.any() for name, mask in trainer.child_network.masks().items() if "unused" in name)
    for name, param in model.named_parameters():
        assert same_bits(param, before[name]) == ("unused" in name or not _is_masked_in_part(trainer, name)), name


def _is_masked_in_part(trainer, name):
    mask = trainer.child_network.masks().get(name)
    return mask is None or bool(mask.any())


def test_a_second_call_goes_on_with_the_same_child_network(tmp_path):
    trainer = make_trainer(tmp_path, D)
    trainer.train()
    child = trainer.child_network
    trainer.train()
    assert trainer.child_network is child
    assert optimizer_of(trainer).state[trainer.model.classifier.weight]["step"] == 12


def test_a_smaller_batch_after_one_without_memory_keeps_the_child_network(tmp_path):
    """Trainer goes on from the weights of the attempt that failed; those of the choice were the pretrained ones."""
    first = make_trainer(tmp_path / "first")
    first.create_optimizer()
    trainer = make_trainer(tmp_path / "out", arguments_={"auto_find_batch_size": True})
    steps = []

    def fail_once(model, inputs):
        steps.append(model.training)  # it is off in the Fisher pass
        if sum(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    trainer.model.register_forward_pre_hook(fail_once)
    trainer.train()
    assert trainer._train_batch_size < trainer.args.per_device_train_batch_size
    assert trainer.child_network.fingerprint == first.child_network.fingerprint


def test_model_init_makes_another_child_network_for_another_model(tmp_path):
    trainer = make_trainer(tmp_path, D)
    options = {"args": trainer.args, "train_dataset": make_data(), "child_tuning": D}
    trainer = ChildTuningTrainer(model_init=lambda: make_model(seed=3), **options)
    trainer.train()
    first = trainer.child_network
    trainer.train()
    assert trainer.child_network is not first
    assert set(optimizer_of(trainer).child_masks) <= set(trainer.model.parameters())


@pytest.mark.parametrize("disabled", [True, False])
def test_the_progress_bar_follows_disable_tqdm(tmp_path, capsys, disabled):
    make_trainer(tmp_path, D, arguments_={"disable_tqdm": disabled}).create_optimizer()
    assert ("Fisher: 100%" in capsys.readouterr().err) is not disabled


def test_bert_like_has_dropout():
    """On which the tests of the random states rely."""
    assert "hidden_dropout_prob" not in BERT_LIKE
    assert make_model().config.hidden_dropout_prob > 0
