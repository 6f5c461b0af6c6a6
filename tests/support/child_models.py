"""Helpers of a child network's tests: a model with masks, its optimizer, and every option of D."""

import pytest
import torch
from helpers import make_params

from childtune_fast import ChildAdamW, ChildNetwork

SHAPES = ((40, 70), (129,), (1,), (), (0,), (3, 1030), (8, 128), (4097,))
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.5},
    "decay all": {"decay": "all", "weight_decay": 0.5},
    "hf, decay all": {"variant": "hf", "decay": "all", "weight_decay": 0.5},
    "maximize": {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    "clipped": {"max_grad_norm": 1e-2},
    "clipped by the child's norm": {"max_grad_norm": 1e-2, "norm_of": "child"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Model(torch.nn.Module):
    """Parameters of the given shapes, named p0, p1, ...; `masks` for all but the last."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES, density=0.3, seed=0):
        super().__init__()
        for i, param in enumerate(make_params(shapes, dtype, seed)):
            setattr(self, f"p{i}", param)
        generator = torch.Generator().manual_seed(seed + 99)
        names = [f"p{i}" for i in range(len(shapes) - 1)]
        self.masks = {n: torch.rand(getattr(self, n).shape, generator=generator) < density for n in names}

    def child(self):
        return ChildNetwork.from_masks(self, self.masks)


def child_adamw(model, **options):
    return ChildAdamW(model.parameters(), **{"lr": 1e-2, "child": model.child(), **options})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]
