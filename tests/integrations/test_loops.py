"""docs/recipes/loops.md: each recipe runs, and moves the child network alone."""

import os

import numpy as np
import pytest
import torch
from models import Tiny
from pages import run
from ranks import launch
from torch import nn
from trainer_runs import make_data, make_model, weights

from childtune_fast import ChildNetwork, estimate_fisher

PAGE = "recipes/loops.md"


def batches(size=4):
    data = [{key: torch.tensor(values) for key, values in row.items()} for row in make_data()]
    return torch.utils.data.DataLoader(data, batch_size=size)


def expected_child(model):
    return ChildNetwork.from_scores(model, estimate_fisher(model, batches(), progress=False), reserve_p=0.3)


def check_moved(model, before, child):
    masks, after = child.masks(), weights(model)
    for name, mask in masks.items():
        assert torch.equal(before[name][~mask], after[name][~mask]), name
        assert (before[name] != after[name])[mask].any() or not mask.any(), name


def test_a_plain_loop():
    model, lines = make_model(), []
    before, child = weights(model), expected_child(make_model())
    names = run(
        PAGE, "A plain loop", model=model, batches=batches(), log=lambda numbers, step: lines.append((step, numbers))
    )
    assert names["child"].fingerprint == child.fingerprint
    check_moved(model, before, child)
    assert [step for step, _ in lines] == [0, 1]
    assert {"child/grad_norm", "child/clip_factor", "child/moved"} == set(lines[1][1])


def train_by_accelerate(size):
    model = make_model()
    before = weights(model)
    names = run(PAGE, "accelerate", model=model, batches=batches(size))
    return names["accelerator"], names["inner"], before, fingerprint_in(names["optimizer"].optimizer)


def fingerprint_in(optimizer):
    return optimizer.state_dict()["param_groups"][0]["child_fingerprint"]


def test_accelerate():
    pytest.importorskip("accelerate")
    _, model, before, fingerprint = train_by_accelerate(size=4)
    child = expected_child(make_model())
    assert fingerprint == child.fingerprint
    check_moved(model, before, child)


def on_two_processes(folder):
    """Each has every other batch of two: together the batches that one process would have."""
    os.environ["ACCELERATE_USE_CPU"] = "true"  # without it accelerate makes no process group on a CPU
    accelerator, model, before, fingerprint = train_by_accelerate(size=2)
    assert accelerator.num_processes == 2
    scores = estimate_fisher(make_model(), batches(2), progress=False)
    child = ChildNetwork.from_scores(make_model(), scores, reserve_p=0.3)
    assert fingerprint == child.fingerprint
    check_moved(model, before, child)


@pytest.mark.slow
def test_accelerate_on_two_processes():
    pytest.importorskip("accelerate")
    launch(on_two_processes)


class Words(Tiny):
    """Of rows of words, as skorch gives them, the classes."""

    def forward(self, x):
        x = self.embedding(x).mean(dim=1)
        for block in self.blocks:
            x = x + block.mlp(block.attention(x))
        return self.classifier(x)


def test_skorch():
    pytest.importorskip("skorch")
    X = np.random.default_rng(0).integers(0, 10, (24, 4))
    y = X[:, 0] % 3
    net = run(PAGE, "skorch", Module=Words, criterion=nn.CrossEntropyLoss, X=X, y=y)["net"]
    train, _ = net.get_split_datasets(X, y)  # the others are for validation
    assert len(train) < len(X)
    everything = [next(iter(torch.utils.data.DataLoader(train, batch_size=128)))]
    scores = estimate_fisher(
        Words(), everything, loss_fn=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]), progress=False
    )
    child = ChildNetwork.from_scores(Words(), scores, reserve_p=0.3)
    assert fingerprint_in(net.optimizer_) == child.fingerprint
    check_moved(net.module_, weights(Words()), child)
