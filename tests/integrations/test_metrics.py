"""What training loops log of Child-Tuning: through a function of one's own, Trainer's loggers and Lightning's."""

import math

import pytest
import torch
from models import Tiny
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from trainer_runs import REFRESHED, D, F, make_trainer
from transformers import TrainerCallback

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.integrations.config import ChildTuningConfig
from childtune_fast.integrations.metrics import StepLog, clip_factor, metrics_of_choice
from childtune_fast.integrations.transformers import ChildTuningTrainer


def with_gradients(model, scale=1.0):
    for i, param in enumerate(model.parameters()):
        param.grad = (torch.linspace(-scale, scale, param.numel()).view_as(param) + i).to(param.dtype)
    return model


def logged(optimizer, steps, every=1):
    found = []
    log = StepLog(optimizer, lambda numbers, step: found.append((step, numbers)), every=every)
    for _ in range(steps):
        optimizer.step()
    log.remove()
    optimizer.step()
    return found


def test_a_choice():
    model = Tiny()
    a, b = (ChildNetwork.random(model, reserve_p=0.3, seed=seed) for seed in (1, 2))
    numbers = metrics_of_choice(a)
    rows = a.summary().tensors
    assert numbers.pop("child/weights") == a.summary().total.count == sum(row.count for row in rows)
    assert numbers.pop("child/density") == pytest.approx(0.3, abs=1e-3)
    for layer in ("blocks.0", "blocks.1"):
        of_layer = [row for row in rows if row.layer == layer]
        density = sum(row.count for row in of_layer) / sum(row.numel for row in of_layer)
        assert numbers.pop(f"child/density/{layer}") == density
    assert numbers == {}
    assert metrics_of_choice(a, b)["child/overlap"] == a.overlap(b)
    assert metrics_of_choice(a, a)["child/overlap"] == 1


def test_steps_of_f():
    model = with_gradients(Tiny())
    norm = get_total_norm([param.grad for param in model.parameters()]).item()
    optimizer = ChildAdamW(model.parameters(), reserve_p=0.3, weight_decay=0.0, max_grad_norm=0.5, seed=1)
    before = [param.detach().clone() for param in model.parameters()]
    found = logged(optimizer, 1)
    fresh = with_gradients(Tiny())
    same = ChildAdamW(fresh.parameters(), reserve_p=0.3, weight_decay=0.0, max_grad_norm=0.5, seed=1)
    same.step()
    moved = sum((p != old).sum().item() for p, old in zip(fresh.parameters(), before, strict=True))
    ((step, numbers),) = found
    assert step == 1
    assert numbers == {
        "child/grad_norm": pytest.approx(norm, rel=1e-6),
        "child/clip_factor": pytest.approx(0.5 / norm, rel=1e-5),
        "child/moved": moved / sum(old.numel() for old in before),
    }
    assert numbers["child/moved"] == pytest.approx(0.3, abs=0.05)


def test_a_step_that_does_not_clip_or_moves_less():
    optimizer = ChildAdamW(with_gradients(Tiny(), 1e-3).parameters(), lr=1e-4, max_grad_norm=1e4)
    ((_, numbers),) = logged(optimizer, 1)
    assert numbers["child/clip_factor"] == 1
    in_float32 = numbers["child/moved"]
    model = with_gradients(Tiny().bfloat16(), 1e-3)
    ((_, numbers),) = logged(ChildAdamW(model.parameters(), lr=1e-4), 1)
    assert "child/clip_factor" not in numbers  # there is no limit
    assert 0 < numbers["child/moved"] < 0.9 * in_float32


def test_weights_outside_of_the_child_network_and_without_a_gradient_do_not_count_as_moved():
    model = with_gradients(Tiny())
    model.embedding.weight.grad = None
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0)
    ((_, numbers),) = logged(ChildAdamW(model.parameters(), child=child, max_grad_norm=1.0, norm_of="child"), 1)
    total = child.summary().total
    free = sum(p.numel() for p in model.parameters() if p.grad is not None) - total.numel
    assert numbers["child/moved"] == pytest.approx((total.count + free) / (total.numel + free), abs=2e-3)
    assert "child/clip_factor" not in numbers  # the norm that clips is another one


def test_a_closure_makes_the_gradients():
    model = Tiny()
    optimizer, found = ChildAdamW(model.parameters()), []
    StepLog(optimizer, lambda numbers, step: found.append(numbers), every=1)
    for scale in (1.0, 3.0):
        optimizer.step(lambda scale=scale: with_gradients(model, scale))
        norm = get_total_norm([param.grad for param in model.parameters()]).item()
        assert found[-1]["child/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert len(found) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_gradients_of_16_bits_is_not_rounded_to_them(dtype):
    model = with_gradients(Tiny().to(dtype), 3e3)  # whose norm float16 cannot hold
    norm = torch.cat([param.grad.double().flatten() for param in model.parameters()]).norm().item()
    ((_, numbers),) = logged(ChildAdamW(model.parameters(), max_grad_norm=0.5), 1)
    assert numbers["child/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert numbers["child/clip_factor"] == pytest.approx(0.5 / norm, rel=1e-6)


def test_every_so_many_steps_until_it_is_removed():
    optimizer = ChildAdamW(with_gradients(Tiny()).parameters())
    assert [step for step, _ in logged(optimizer, 7, every=3)] == [1, 4, 7]


def test_a_scaled_loss():
    model, scaler = with_gradients(Tiny()), torch.amp.GradScaler("cpu", init_scale=8.0)
    norm = get_total_norm([param.grad for param in model.parameters()]).item()
    for param in model.parameters():
        param.grad *= 8
    optimizer = ChildAdamW(model.parameters(), max_grad_norm=0.5)
    scaler.scale(torch.ones(()))
    found = []
    StepLog(optimizer, lambda numbers, step: found.append(numbers))
    scaler.step(optimizer)
    assert found[0]["child/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert found[0]["child/clip_factor"] == pytest.approx(0.5 / norm, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": None}, TypeError, "optimizer must be a ChildAdamW"),
        ({"log": 3}, TypeError, "log must be a function of numbers and step"),
        ({"every": 0}, ValueError, "every must be a whole number above 0"),
        ({"every": True}, ValueError, "every must be a whole number above 0"),
    ],
)
def test_wrong_arguments(change, error, message):
    options = {"optimizer": ChildAdamW(Tiny().parameters()), "log": print, **change}
    with pytest.raises(error, match=message):
        StepLog(options.pop("optimizer"), options.pop("log"), **options)


# ---- Trainer -------------------------------------------------------------------------------------------------------


def rows_of(trainer, name):
    return [(row["step"], row[name]) for row in trainer.state.log_history if name in row]


def test_trainer_logs_choices_and_refreshes(tmp_path):
    trainer = make_trainer(tmp_path, REFRESHED)
    trainer.train()
    assert [step for step, _ in rows_of(trainer, "child/density")] == [0, 3]
    assert [step for step, _ in rows_of(trainer, "child/overlap")] == [3]
    assert rows_of(trainer, "child/overlap")[0][1] < 1
    assert len(rows_of(trainer, "child/density/bert.encoder.layer.1")) == 2


@pytest.mark.parametrize("config", [F, D], ids=["F", "D"])
def test_trainer_logs_steps(tmp_path, config):
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode=config.mode, log_every=2), arguments_={"warmup_steps": 0})
    trainer.train()
    assert [step for step, _ in rows_of(trainer, "child/moved")] == [1, 3, 5]
    assert all(0 < share <= 1 for _, share in rows_of(trainer, "child/moved"))
    assert rows_of(trainer, "child/grad_norm") == rows_of(trainer, "child/clip_factor") == []  # see below
    assert len(rows_of(trainer, "child/density")) == (config.mode == "D")


class Means(ChildTuningTrainer):
    """Begins new means at each log of its own, as SFTTrainer does."""

    logs = 0

    def log(self, *args, **kwargs):
        self.logs += 1
        super().log(*args, **kwargs)


def test_a_trainers_own_log_is_not_called_more_often(tmp_path):
    options = {"logging_strategy": "steps", "logging_steps": 2}
    plain = make_trainer(tmp_path, D, trainer=Means, arguments_=options)
    plain.train()
    logging = make_trainer(tmp_path, ChildTuningConfig(mode="D", log_every=1), trainer=Means, arguments_=options)
    logging.train()
    assert plain.logs == logging.logs == 4  # of six steps, and the summary
    assert len(rows_of(logging, "child/moved")) == 6


class Interrupted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_its_log(tmp_path):
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="F", log_every=4))
    trainer.add_callback(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupted)
    optimizer = trainer.child_optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    trainer.train()
    assert [step for step, _ in rows_of(trainer, "child/moved")] == [1, 5]


@pytest.mark.parametrize(("limit", "log_every"), [(0.1, 4), (1e4, 4), (0.0, 4), (0.1, None)])
def test_trainer_logs_by_what_it_clips_beside_its_own_norm(tmp_path, limit, log_every):
    options = {"logging_strategy": "steps", "logging_steps": 3, "max_grad_norm": limit}
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="F", log_every=log_every), arguments_=options)
    trainer.train()
    norms, factors = rows_of(trainer, "grad_norm"), rows_of(trainer, "child/clip_factor")
    assert [step for step, _ in norms] == [3, 6]
    if log_every is None or not limit:
        assert factors == []
    else:
        assert factors == [(step, pytest.approx(min(1, limit / norm), rel=1e-5)) for step, norm in norms]


@pytest.mark.parametrize("limit", [None, -1.0])  # which Trainers before transformers 5 take for no limit
def test_no_limit_has_no_factor(tmp_path, limit):
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="F", log_every=1))
    trainer.args.max_grad_norm = limit
    trainer.log({"grad_norm": 2.0})
    assert rows_of(trainer, "grad_norm") == [(0, 2.0)]
    assert rows_of(trainer, "child/clip_factor") == []


@pytest.mark.parametrize(
    ("norm", "factor"), [(2.0, 0.25), (0.1, 1.0), (0.0, 1.0), (math.inf, 0.0), (math.nan, math.nan)]
)
def test_clip_factors(norm, factor):
    assert clip_factor(norm, 0.5) == pytest.approx(factor, rel=1e-5, nan_ok=True)
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    clip_grads_with_norm_([param], 0.5, torch.tensor(norm))  # torch's own rule
    assert clip_factor(norm, 0.5) == pytest.approx(param.grad.item(), rel=1e-6, nan_ok=True)


def test_tensorboard_reads_it_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 3}
    trainer = make_trainer(tmp_path, ChildTuningConfig(mode="D", log_every=3), arguments_=options)
    trainer.train()
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    read = accumulator.EventAccumulator(str(events)).Reload()
    (density,) = read.Scalars("train/child/density/bert.encoder.layer.0")
    rows = trainer.child_network.summary().layers
    assert density.value == pytest.approx(next(row.density for row in rows if row.name.endswith("layer.0")), rel=1e-6)
    assert [event.step for event in read.Scalars("train/child/moved")] == [1, 4]
    assert [event.step for event in read.Scalars("train/child/clip_factor")] == [3, 6]
