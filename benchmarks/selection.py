"""The choice of a child network among 302 M scores: ours, and the threshold as the published code finds it."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import Parameter, ParameterList

from childtune_fast import ChildNetwork
from childtune_fast.native import load

from .costs import resident_growth

RESERVE_P = 0.3
SHAPE, TENSORS = (1024, 4096), 72


def make_scores() -> ParameterList:
    """Returns scores over many orders of magnitude, as Fisher scores are; as parameters, to be their own model."""
    generator = torch.Generator().manual_seed(0)
    return ParameterList(
        Parameter(torch.randn(SHAPE, generator=generator).mul_(3).sub_(20).exp_()) for _ in range(TENSORS)
    )


def ours(scores: ParameterList) -> ChildNetwork:
    """Chooses the weights and packs their masks."""
    named = dict(scores.named_parameters())
    return ChildNetwork.from_scores(scores, named, reserve_p=RESERVE_P, maskable=lambda name: True)


def percentile(scores: ParameterList) -> np.float32:
    """Finds the threshold, and makes no mask yet."""
    flat = np.concatenate([tensor.detach().view(-1).numpy() for tensor in scores])
    return np.percentile(flat, 100 * (1 - RESERVE_P))


CONTESTANTS = {"ours": ours, "percentile": percentile}


def extra_memory(name: str) -> float:
    """Returns how many bytes a contestant takes at its peak beside scores and masks; to be run in a process of its own.

    NaN where the system does not tell.
    """
    load.load_native()
    scores = make_scores()
    found: list = []
    choose: Callable = CONTESTANTS[name]
    growth = resident_growth(lambda: found.append(choose(scores)))
    if growth is None:
        return float("nan")
    masks = found[0].packed.values() if name == "ours" else ()
    return growth - sum(mask.bits.nbytes + mask.offsets.nbytes for mask in masks)
