"""Small networks that learn scikit-learn's digits: what their layers' spectra say, and what the layers did learn.

A layer learned if the trained network errs more when that layer alone is put back to what it was before training.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from childtune_fast.spectra import analyze

WIDTH, BATCH, TRAIN = 512, 50, 1400
SEEDS = 10
LAYERS = {"0": f"{WIDTH} x 64", "2": f"{WIDTH} x {WIDTH}"}  # {name: shape} of those that are looked at
SETTINGS = [  # classes, learning rate of Adam, epochs
    (10, 1e-3, 5),
    (10, 1e-4, 20),
    (2, 1e-3, 5),
    (2, 1e-4, 20),
]

Record = dict[str, Any]


def digits(classes: int) -> tuple[Tensor, Tensor]:
    """Returns 1797 images [64] in random order and their classes: 10, or 2, which are below 5 and from 5 on."""
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    found = load_digits()
    target = torch.from_numpy(found.target)[order]
    return torch.from_numpy(found.data).float()[order] / 16, target if classes == 10 else (target >= 5).long()


def trained(classes: int, lr: float, epochs: int, seed: int) -> Record:
    """Trains a network, and returns its accuracy and what is found of its layers before and after."""
    torch.manual_seed(seed)
    inputs, target = digits(classes)
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(inputs[batch]), target[batch]).backward()
            optimizer.step()
    after = copy.deepcopy(net.state_dict())

    def accuracy(state: dict[str, Tensor]) -> float:
        net.load_state_dict(state)
        with torch.no_grad():
            return float((net(inputs[TRAIN:]).argmax(1) == target[TRAIN:]).float().mean())

    found: Record = {"accuracy": round(accuracy(after), 4)}
    spectra = [{row.longname: row for row in analyze(state, null=1, progress=False)} for state in (before, after)]
    for name in LAYERS:
        restored = {**after, **{key: before[key] for key in after if key.split(".")[0] == name}}
        found[name] = {
            "alpha": [round(of_state[name].alpha, 4) for of_state in spectra],
            "rand_spikes": [of_state[name].rand_spikes for of_state in spectra],
            "accuracy_without": round(accuracy(restored), 4),
        }
    return found


def measure() -> list[Record]:
    """Returns a record for each of SETTINGS, with what was found for each seed."""
    return [
        {
            "classes": classes,
            "lr": lr,
            "epochs": epochs,
            "found": [trained(classes, lr, epochs, s) for s in range(SEEDS)],
        }
        for classes, lr, epochs in SETTINGS
    ]
