"""ChildTuningTrainer's estimations leave weights and data as they would be without them."""

import pytest
import torch
from helpers import same_bits
from torch.utils.data import DataLoader, RandomSampler
from trainer_runs import REFRESHED, D, F, make_data, make_model, make_trainer, weights

from childtune_fast.integrations.transformers import ChildTuningTrainer


class Recording(ChildTuningTrainer):
    """Keeps one loader with a generator of its own, draws in the loss, and notes what it trains with."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.generator = torch.Generator().manual_seed(5)
        self.order, self.noise, self.trains = [], [], False
        options = {"batch_size": 4, "collate_fn": self.data_collator, **self.loader_options}
        self.loader = DataLoader(self.train_dataset, **options)

    def get_train_dataloader(self):
        return self.loader

    def training_step(self, model, inputs, *args, **options):
        self.order.append(inputs["input_ids"].tolist())
        self.trains = True
        loss = super().training_step(model, inputs, *args, **options)
        self.trains = False
        return loss

    def compute_loss(self, *args, **options):
        noise = torch.rand((), generator=self.generator)
        if self.trains:
            self.noise.append(noise.item())
        return super().compute_loss(*args, **options)


def seeded():
    return torch.Generator().manual_seed(7)


LOADERS = {
    "generator": lambda data: {"shuffle": True, "generator": seeded()},
    "sampler": lambda data: {"sampler": RandomSampler(data, generator=seeded())},
    "persistent workers": lambda data: {
        "shuffle": True,
        "generator": seeded(),
        "num_workers": 1,
        "persistent_workers": True,
    },
}


def recording(folder, config, kind):
    model, data = make_model(), make_data()
    model.bert.embeddings.word_embeddings.max_norm = 0.05  # all rows are longer
    trainer = type("", (Recording,), {"loader_options": LOADERS[kind](data)})
    return make_trainer(folder, config, model=model, data=data, trainer=trainer)


@pytest.mark.parametrize("kind", LOADERS)
def test_training_gets_the_data_that_it_would_get_without_scores(tmp_path, kind):
    runs = [recording(tmp_path, config, kind) for config in (F, D, REFRESHED)]
    for trainer in runs:
        trainer.train()
    assert len(runs[0].order) == 6
    assert runs[0].order[:3] != runs[0].order[3:]
    assert all(trainer.order == runs[0].order and trainer.noise == runs[0].noise for trainer in runs)


def test_a_table_with_max_norm_stays_as_it_was(tmp_path):
    trainer = recording(tmp_path, D, "generator")
    before = weights(trainer.model)
    rows = before["bert.embeddings.word_embeddings.weight"]
    assert (rows[1:].norm(dim=1) > 0.05).all()
    trainer.create_optimizer()
    after = weights(trainer.model)
    assert trainer.child_network is not None
    assert all(same_bits(after[name], before[name]) for name in before)
