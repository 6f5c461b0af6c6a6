"""ChildTuningCallback and docs/recipes/lightning.md: Child-Tuning_D in Lightning's Trainer."""

import pytest
import torch
from models import family
from pages import codes
from ranks import launch
from trainer_runs import weights

lightning = pytest.importorskip("lightning")
pandas = pytest.importorskip("pandas")
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning_runs import Classifier, fitted, loader  # noqa: E402

from childtune_fast import ChildNetwork, estimate_fisher  # noqa: E402
from childtune_fast.integrations.lightning import ChildTuningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and its dependencies warn of is theirs


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
