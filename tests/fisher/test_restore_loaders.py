"""estimate_fisher leaves DataLoaders as they were: the order of the data and all that is drawn for it."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DataLoaderConfiguration
from fisher_models import estimate, make_model
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset

EXAMPLES = 12


class Numbered(Dataset):
    """Examples that say which they are and what was drawn for them."""

    def __init__(self, draw=lambda: 0.0):
        self.draw = draw

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return torch.tensor([float(i), float(self.draw()), *torch.rand(4).tolist()])


def batches_of(rows):
    rows = torch.stack(rows)
    return {"x": rows, "y": [torch.zeros(len(rows), dtype=torch.long), rows]}


class Drawing:
    """A collate_fn with a generator of its own, which it makes when it is first called, as transformers' do."""

    def __init__(self):
        self.generator = None

    def __call__(self, rows):
        if self.generator is None:
            self.generator = np.random.default_rng(3)
        return batches_of([row + self.generator.normal() for row in rows])


class Shuffled:
    """A batch sampler that derives from no class of torch's, and counts its epochs."""

    def __init__(self):
        self.sampler = RandomSampler(range(EXAMPLES), generator=seeded())

    def __iter__(self):
        return iter(BatchSampler(self.sampler, 4, False))

    def __len__(self):
        return 3


class Epochs(RandomSampler):
    def __iter__(self):
        self.epoch = getattr(self, "epoch", 0) + 1
        self.generator = torch.Generator().manual_seed(self.epoch)
        return super().__iter__()


def seeded():
    return torch.Generator().manual_seed(7)


def loader(dataset=None, collate_fn=batches_of, **options):
    options = (
        options if "batch_sampler" in options else {"batch_size": 4, "shuffle": "sampler" not in options} | options
    )
    return DataLoader(Numbered() if dataset is None else dataset, collate_fn=collate_fn, **options)


class WithRng(Numbered):
    def __init__(self, rngs):
        super().__init__(self.draw_from_all)
        self.rngs = rngs

    def draw_from_all(self):
        return sum(rng.random() for rng in self.rngs)


LOADERS = {
    "generator": lambda: loader(generator=seeded()),
    "no generator": loader,
    "sampler": lambda: loader(sampler=RandomSampler(range(EXAMPLES), generator=seeded())),
    "batch sampler": lambda: loader(
        batch_sampler=BatchSampler(RandomSampler(range(EXAMPLES), generator=seeded()), 4, False)
    ),
    "batch sampler of its own": lambda: loader(batch_sampler=Shuffled()),
    "sampler that counts": lambda: loader(sampler=Epochs(range(EXAMPLES))),
    "seedable": lambda: loader(sampler=SeedableRandomSampler(range(EXAMPLES), data_seed=3)),
    "dataset": lambda: loader(WithRng([random.Random(1), np.random.RandomState(1), np.random.default_rng(1)])),
    "a method": lambda: loader(Subset(Numbered(random.Random(1).random), range(EXAMPLES))),
    "a partial function": lambda: loader(Numbered(partial(torch.rand, 1, generator=seeded()))),
    "a closure": lambda: (lambda rng: loader(Numbered(lambda: rng.random())))(random.Random(1)),
    "collate_fn": lambda: loader(collate_fn=Drawing()),
    "workers": lambda: loader(generator=seeded(), num_workers=2),
    "persistent workers": lambda: loader(generator=seeded(), num_workers=2, persistent_workers=True),
    "accelerate": lambda: Accelerator(cpu=True).prepare(loader(generator=seeded())),
    "accelerate, seedable": lambda: Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    ).prepare(loader()),
}


def seen(batches, epochs=2):
    return [batch["y"][1].tolist() for _ in range(epochs) for batch in batches]


@pytest.mark.parametrize("max_batches", [None, 1])
@pytest.mark.parametrize("epochs_before", [0, 1])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_data_come_in_the_order_in_which_they_would_have(kind, epochs_before, max_batches):
    orders = []
    for estimated in (False, True):
        model = make_model()  # which seeds torch
        batches = LOADERS[kind]()
        before = seen(batches, epochs_before)
        if estimated:
            estimate(model, batches, max_batches=max_batches)
        orders.append(before + seen(batches))
    assert orders[0] == orders[1]
    assert orders[0][-1] != orders[0][-4]  # the same batch of the next epoch
