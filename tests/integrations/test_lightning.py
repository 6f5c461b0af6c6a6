"""ChildTuningCallback and docs/recipes/lightning.md: Child-Tuning_D in Lightning's Trainer."""

import pytest
import torch
from models import family
from pages import codes
from ranks import launch
from trainer_runs import make_data, weights

lightning = pytest.importorskip("lightning")
pandas = pytest.importorskip("pandas")
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher  # noqa: E402
from childtune_fast.integrations.lightning import ChildTuningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and its dependencies warn of is theirs


class Classifier(lightning.LightningModule):
    """With dropout in the model, a logged loss and a metric that adds up."""

    def __init__(self, model=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = family("BERT", num_labels=3)[0] if model is None else model
        self.accuracy = MulticlassAccuracy(3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.accuracy.update(output.logits, batch["labels"])
        self.log("loss", output.loss)
        self.log_dict({"accuracy": self.accuracy, "twice": 2 * output.loss})
        return {"loss": output.loss}

    def on_train_batch_start(self, batch, batch_idx):
        numbers = batch["input_ids"], torch.get_rng_state(), self.accuracy.tp
        self.seen.append([tensor.sum().item() for tensor in numbers])

    def configure_optimizers(self):
        return ChildAdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0)


def loader(batch=4, shuffle=True):
    data = [{key: torch.tensor(values) for key, values in row.items()} for row in make_data()]
    generator = torch.Generator().manual_seed(3)
    return torch.utils.data.DataLoader(data, batch_size=batch, shuffle=shuffle, generator=generator)


def trainer_of(folder, epochs=2, callbacks=(), **options):
    return lightning.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def fitted(folder, callback, module=None, batches=None, ckpt_path=None, **options):
    module = Classifier() if module is None else module
    torch.manual_seed(5)
    trainer = trainer_of(folder, callbacks=[] if callback is None else [callback], **options)
    trainer.fit(module, loader() if batches is None else batches, ckpt_path=ckpt_path)
    return module, trainer


def test_the_child_network_is_that_of_the_training_loss(tmp_path):
    module, before = Classifier(), weights(Classifier())
    scores = estimate_fisher(
        Classifier().model, loader(batch=1), max_batches=12, loss_fn=lambda m, b: m(**b).loss, progress=False
    )
    callback = ChildTuningCallback(reserve_p=0.4)
    fitted(tmp_path, callback, module, loader(batch=1))
    named = {f"model.{name}": score for name, score in scores.items()}
    assert callback.child_network.fingerprint == ChildNetwork.from_scores(module, named, reserve_p=0.4).fingerprint
    after = weights(module)
    for name, mask in callback.child_network.masks().items():
        assert torch.equal(before[name][~mask], after[name][~mask])
        assert (before[name] != after[name])[mask].any() or not mask.any()


def test_the_training_sees_what_it_would_have_seen(tmp_path):
    plain, _ = fitted(tmp_path, None)
    ours, _ = fitted(tmp_path, ChildTuningCallback())
    assert [seen[:2] for seen in ours.seen] == [seen[:2] for seen in plain.seen]  # order of the data, draws of dropout
    assert ours.seen[0][2] == plain.seen[0][2] == 0  # of the metric
    assert "log" not in vars(ours)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_fit_equals_one_that_was_not_interrupted(tmp_path, precision):
    batches = loader(shuffle=False)
    whole, _ = fitted(tmp_path, ChildTuningCallback(), batches=batches, precision=precision)
    first = ChildTuningCallback()
    module, trainer = fitted(tmp_path, first, batches=batches, precision=precision, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.get_rng_state()  # which Lightning does not save
    callback, resumed = ChildTuningCallback(), Classifier()
    resumed.on_train_start = lambda: torch.set_rng_state(state)
    with torch.no_grad():
        for param in resumed.parameters():
            param.zero_()  # the checkpoint has them
    fitted(tmp_path, callback, resumed, batches, tmp_path / "one.ckpt", precision=precision)
    assert callback.child_network.fingerprint == first.child_network.fingerprint
    assert module.seen + resumed.seen == whole.seen
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_16_mixed_scores_in_float32_and_clips_in_the_step(tmp_path):
    expected, callback = ChildTuningCallback(), ChildTuningCallback()
    fitted(tmp_path, expected)
    plugin = MixedPrecision("16-mixed", "cpu")  # Trainer(precision=) takes bfloat16 instead on a CPU
    module, _ = fitted(tmp_path, callback, plugins=[plugin])
    assert plugin.scaler.get_scale() > 1
    assert callback.child_network.fingerprint == expected.child_network.fingerprint
    assert all(torch.isfinite(param).all() for param in module.parameters())


def test_loggers_get_the_density(tmp_path):
    callback, logger = ChildTuningCallback(), CSVLogger(tmp_path, name="")
    fitted(tmp_path, callback, logger=logger)
    logger.save()
    row = pandas.read_csv(tmp_path / "version_0" / "metrics.csv").iloc[0]
    found = {name: value for name, value in row.items() if name.startswith("child/")}
    total = callback.child_network.summary().total
    layers = [f"child/density/model.bert.encoder.layer.{i}" for i in range(2)]
    assert set(found) == {"child/weights", "child/density", *layers}
    assert found["child/weights"] == total.count
    assert found["child/density"] == pytest.approx(0.3, abs=1e-4)


def test_loggers_get_what_steps_do(tmp_path):
    logger = CSVLogger(tmp_path, name="")
    fitted(tmp_path, ChildTuningCallback(log_every=2), logger=logger)
    logger.save()
    rows = pandas.read_csv(tmp_path / "version_0" / "metrics.csv").dropna(subset="child/moved")
    assert rows["step"].tolist() == [0, 2, 4]  # of six; Lightning counts from 0
    assert ((rows["child/clip_factor"] * rows["child/grad_norm"]).round(3) <= 1).all()
    assert ((rows["child/moved"] > 0.3) & (rows["child/moved"] < 1)).all()


@pytest.mark.parametrize(("ours", "lightnings"), [({"fisher_batches": 2}, {}), ({}, {"limit_train_batches": 2})])
def test_no_more_batches_than_asked_for(tmp_path, ours, lightnings):
    module, calls = Classifier(), []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: calls.append(batch) or step(batch, batch_idx)
    fitted(tmp_path, ChildTuningCallback(**ours), module, max_steps=1, **lightnings)
    assert len(calls) == 3  # two batches for the scores, one step


def fit_on_two(folder):
    """On each of two processes: both have the child network of one that sees all batches, each of one example."""
    callback = ChildTuningCallback()
    before, ranks = weights(Classifier()), {"devices": 2, "strategy": "ddp", "max_steps": 2}
    module, trainer = fitted(folder, callback, batches=loader(batch=1), **ranks)
    assert trainer.world_size == 2
    masks, after = callback.child_network.masks(), weights(module)
    for name, mask in masks.items():
        assert torch.equal(before[name][~mask], after[name][~mask])
    for tensor in (*after.values(), *masks.values()):
        values = tensor.byte() if tensor.dtype == torch.bool else tensor
        gathered = [torch.empty_like(values) for _ in range(2)]
        torch.distributed.all_gather(gathered, values)
        assert torch.equal(*gathered)
    scores = estimate_fisher(Classifier(), loader(batch=1), loss_fn=lambda m, b: m.model(**b).loss, progress=False)
    expected = ChildNetwork.from_scores(Classifier(), scores, reserve_p=0.3)
    assert callback.child_network.overlap(expected) > 0.99


@pytest.mark.slow
def test_two_processes_take_the_mean_of_their_scores():
    launch(fit_on_two)


# ---- One callback in several fits ----------------------------------------------------------------------------------


def other(seed=7):
    torch.manual_seed(seed)
    return Classifier(family("BERT", num_labels=3)[0])


def chosen_alone(folder, **options):
    callback = ChildTuningCallback()
    fitted(folder, callback, other(), **options)
    return callback.child_network.fingerprint


def test_a_fit_that_failed_leaves_nothing_to_the_next(tmp_path):
    callback = ChildTuningCallback(log_every=1)
    _, trainer = fitted(tmp_path, callback, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    failing = Classifier()
    failing.on_train_batch_start = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, callback, failing, ckpt_path=tmp_path / "one.ckpt")
    assert not failing.trainer.optimizers[0]._optimizer_step_post_hooks
    fitted(tmp_path, callback, other())
    assert callback.child_network.fingerprint == chosen_alone(tmp_path)


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_finders_which_restore_a_checkpoint_of_their_own(tmp_path, finder):
    """The second fit with a callback that has been used; a finder changes the rate or the batch size."""
    callback = ChildTuningCallback()
    fitted(tmp_path, callback)
    module = other()
    module.lr, module.batch_size = 1e-3, 2
    module.train_dataloader = lambda: loader(module.batch_size)
    torch.manual_seed(5)
    options = {"num_training_steps": 3} if finder is LearningRateFinder else {"max_trials": 1, "steps_per_trial": 1}
    trainer_of(tmp_path, callbacks=[finder(**options), callback]).fit(module)
    alone = ChildTuningCallback()
    fitted(tmp_path, alone, other(), loader(module.batch_size))
    assert callback.child_network.overlap(alone.child_network) > 0.99


def test_one_trainer_resumes_in_another_module(tmp_path):
    callback = ChildTuningCallback()
    _, trainer = fitted(tmp_path, callback, epochs=1)
    first = callback.child_network.fingerprint
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Classifier(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert trainer.global_step == 6
    assert callback.child_network.fingerprint == first


def test_what_a_module_collects(tmp_path):
    class Collecting(Classifier):
        def __init__(self):
            super().__init__()
            self.losses, self.count, self.by_label = [], 0, {"all": []}

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.losses.append(loss.detach())
            self.by_label["all"].append(1)
            self.count += 1
            self.logger.log_metrics({"of the step": 1.0}, step=self.global_step)
            return loss

    module, logger = Collecting(), CSVLogger(tmp_path, name="")
    losses = module.losses
    fitted(tmp_path, ChildTuningCallback(), module, epochs=1, logger=logger)
    logger.save()
    assert losses is module.losses
    assert len(losses) == len(module.by_label["all"]) == module.count == 3
    rows = pandas.read_csv(tmp_path / "version_0" / "metrics.csv")
    assert rows["of the step"].count() == 3


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_another_optimizer(tmp_path):
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    with pytest.raises(ValueError, match=r"configure_optimizers must return a ChildAdamW \(got AdamW\)"):
        fitted(tmp_path, ChildTuningCallback(), module)


def test_manual_optimization(tmp_path):
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"must leave the optimization to Lightning, .*automatic_optimization=False"):
        fitted(tmp_path, ChildTuningCallback(), module)


def test_several_loaders(tmp_path):
    with pytest.raises(ValueError, match=r"there must be one loader of training batches \(got a dict"):
        fitted(tmp_path, ChildTuningCallback(), batches={"a": loader(), "b": loader()})


def test_a_stream_without_an_end(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from loader().dataset

    batches = torch.utils.data.DataLoader(Stream(), batch_size=4)
    with pytest.raises(ValueError, match="fisher_batches must say how many batches to score"):
        fitted(tmp_path, ChildTuningCallback(), batches=batches, max_steps=2)
    fitted(tmp_path, ChildTuningCallback(fisher_batches=2), batches=batches, max_steps=2)


def test_a_step_without_a_loss(tmp_path):
    module = Classifier()
    module.training_step = lambda batch, batch_idx: None
    with pytest.raises(ValueError, match=r"training_step must return a loss for every batch \(got NoneType\)"):
        fitted(tmp_path, ChildTuningCallback(), module)


def test_a_checkpoint_without_a_child_network(tmp_path):
    _, trainer = fitted(tmp_path, None, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"must resume from a checkpoint with its child network \(got none in "):
        fitted(tmp_path, ChildTuningCallback(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize(("options", "error"), [({"reserve_p": 30}, ValueError), ({"train_mode": 1}, TypeError)])
def test_options_out_of_their_range(options, error):
    with pytest.raises(error, match=next(iter(options))):
        ChildTuningCallback(**options)


# ---- The page ------------------------------------------------------------------------------------------------------


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    made = []
    original = lightning.Trainer

    def trainer(**options):
        made.append(original(**quiet, **options))
        return made[-1]

    monkeypatch.setattr(lightning, "Trainer", trainer)
    names = {"model": family("BERT", num_labels=3)[0], "batches": loader()}
    first, resumed = codes("recipes/lightning.md")
    exec(first, names)
    made[0].save_checkpoint("last.ckpt")
    exec(resumed, names)
    assert [trainer.global_step for trainer in made] == [9, 18]
    one, other = (t.callbacks[0].child_network for t in made)
    assert one.fingerprint == other.fingerprint
