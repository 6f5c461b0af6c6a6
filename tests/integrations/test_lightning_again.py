"""One ChildTuningCallback in several fits, with failures, finders and checkpoints in between; what modules collect."""

import pytest
import torch
from models import family

pytest.importorskip("lightning")
pandas = pytest.importorskip("pandas")
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning_runs import Classifier, fitted, loader, trainer_of  # noqa: E402

from childtune_fast.integrations.lightning import ChildTuningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and its dependencies warn of is theirs


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
