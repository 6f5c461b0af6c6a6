"""Helpers of the Fisher tests: a small model, its batches, and the scores by a plain loop."""

import torch
from torch import nn

from childtune_fast import estimate_fisher

BATCHES, SIZE = 5, 4


def make_model(dropout=0.0, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 3)).to(dtype)


def make_batches(seed=0, dtype=torch.float32, count=BATCHES):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(SIZE, 6, generator=generator, dtype=torch.float64).to(dtype),
            "y": [torch.randint(3, (SIZE,), generator=generator), "a string"],
        }
        for _ in range(count)
    ]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"][0])


def estimate(model, batches, **options):
    return estimate_fisher(model, batches, **{"loss_fn": loss_fn, "progress": False, **options})


def examples_of(batches):
    return [{"x": b["x"][i : i + 1], "y": [b["y"][0][i : i + 1]]} for b in batches for i in range(SIZE)]


def reference(model, batches, grad_clip=None):
    """The mean of squared gradients by a plain loop, with the published code's clipping."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, p in model.named_parameters():
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(p, grad_clip)
            sums[name] += p.grad**2
    model.zero_grad()
    return {name: s / len(batches) for name, s in sums.items()}
