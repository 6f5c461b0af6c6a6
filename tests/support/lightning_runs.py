"""Helpers of the tests of Lightning's callback: a module with dropout, a log and a metric, and short fits."""

import lightning
import torch
from models import family
from torchmetrics.classification import MulticlassAccuracy
from trainer_runs import make_data

from childtune_fast import ChildAdamW


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
