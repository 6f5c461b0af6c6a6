"""SpectraCallback: it writes the spectra of a training, and changes nothing in it."""

import re
import sys

import pytest
import torch
from torch import nn
from trainer_runs import BOTH, Recorder, make_best, make_model, make_trainer, weights
from transformers import TrainerState

from childtune_fast import spectra
from childtune_fast.integrations.transformers import SpectraCallback


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_training_is_the_same_with_it(config, tmp_path):
    trained, random = [], []
    for callbacks in ([], [SpectraCallback(tmp_path / "spectra", every=1, null=1)]):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, config, callbacks=[recorder, *callbacks])
        trainer.train()
        trained.append(weights(trainer.model))
        random.append([(state.tolist(), *others) for state, *others in recorder.random])
    assert all(torch.equal(param, trained[1][name]) for name, param in trained[0].items())
    assert random[0] == random[1]


@pytest.mark.parametrize(("every", "steps"), [("epoch", [0, 3, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_it_writes_the_beginning_what_is_asked_for_and_the_end(every, steps, tmp_path):
    callback = SpectraCallback(tmp_path / "in" / "spectra", every=every)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    at_first = spectra.analyze(trainer.model, dtype=torch.float32, progress=False)
    trainer.train()
    at_last = spectra.analyze(trainer.model, dtype=torch.float32, progress=False)
    files = sorted((tmp_path / "in" / "spectra").iterdir())
    assert [file.name for file in files] == ["alpha.png", *(f"step-{step:06}.json" for step in steps)]
    assert list(callback.found) == steps
    assert repr(callback.found[0].rows) == repr(at_first.rows)
    assert repr(spectra.Spectra.from_json(files[-1]).rows) == repr(at_last.rows) != repr(at_first.rows)


def test_another_training_begins_anew(tmp_path):
    callback = SpectraCallback(tmp_path / "spectra")
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    first = callback.found[0]
    trainer.train()
    assert repr(callback.found[0].rows) != repr(first.rows)


def test_only_the_first_process_writes(tmp_path):
    callback = SpectraCallback(tmp_path / "spectra")
    callback.on_train_begin(None, TrainerState(is_world_process_zero=False), None, model=nn.Linear(32, 32))
    callback.on_train_end(None, TrainerState(is_world_process_zero=False), None, model=nn.Linear(32, 32))
    assert callback.found == {}
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_whole_weights_is_refused(tmp_path):
    message = "SpectraCallback: the model must have a layer that can be analysed (got 'weight': on the meta device"
    for first in (True, False):  # every process, for the others would wait for the first
        state = TrainerState(is_world_process_zero=first)
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            SpectraCallback(tmp_path).on_train_begin(None, state, None, model=nn.Linear(32, 32, device="meta"))


@pytest.mark.parametrize("every", ["step", 0, -3, True, 1.5, None])
def test_every_must_be_an_epoch_or_a_number(every, tmp_path):
    with pytest.raises(ValueError, match=r"^SpectraCallback: every must be 'epoch' or a number of steps"):
        SpectraCallback(tmp_path, every=every)
    with pytest.raises(TypeError, match=r"^SpectraCallback: folder must be a path"):
        SpectraCallback(3)


def test_the_last_step_is_looked_at_before_the_best_checkpoint_is_loaded(tmp_path):
    callback = SpectraCallback(tmp_path / "spectra", every=100)
    trainer, notes = make_best(tmp_path)
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.found) == [0, 9]
    last = {name: param for name, param in notes.weights[-1].items() if param.ndim == 2}
    expected = {row.longname: row.alpha for row in spectra.analyze(last, dtype=torch.float32, progress=False)}
    assert {row.longname: row.alpha for row in callback.found[9]} == expected
    best = spectra.analyze(trainer.model, dtype=torch.float32, progress=False)
    assert repr(best.rows) != repr(callback.found[9].rows)


def test_a_training_that_diverged_ends_as_without_it(tmp_path):
    callback = SpectraCallback(tmp_path / "spectra")
    model = make_model()
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback])
    callback.on_train_begin(None, TrainerState(), None, model=trainer.model)
    with torch.no_grad():
        for param in trainer.model.parameters():
            param.fill_(torch.nan)
    state = TrainerState(global_step=3)
    callback.on_epoch_end(None, state, None, model=trainer.model)
    callback.on_train_end(None, state, None, model=trainer.model)
    assert callback.found[3].summary()["fitted"] == 0
    assert (tmp_path / "spectra" / "alpha.png").exists()


def test_matplotlib_is_asked_for_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        SpectraCallback(tmp_path)
