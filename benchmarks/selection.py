"""Contestants in choosing a child network among 302 M scores: ours, and the published code's search of a threshold."""

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
    """Returns scores that span many orders of magnitude, as Fisher scores do.

    They are parameters of a module, so that they also serve as the model.
    """
    generator = torch.Generator().manual_seed(0)
    return ParameterList(
        Parameter(torch.randn(SHAPE, generator=generator).mul_(3).sub_(20).exp_()) for _ in range(TENSORS)
    )


def ours(scores: ParameterList) -> ChildNetwork:
    """Returns the child network of the highest scores, masks included."""
    named = dict(scores.named_parameters())
    return ChildNetwork.from_scores(scores, named, reserve_p=RESERVE_P, maskable=lambda name: True)


def percentile(scores: ParameterList) -> np.float32:
    """Returns the threshold of the highest scores, as numpy finds it; makes no mask."""
    flat = np.concatenate([tensor.detach().view(-1).numpy() for tensor in scores])
    return np.percentile(flat, 100 * (1 - RESERVE_P))


CONTESTANTS = {"ours": ours, "percentile": percentile}


def extra_memory(name: str) -> float:
    """Returns the most bytes that a contestant takes beside scores and masks; NaN if the system cannot say.

    It must run in a new process, because memory that was used before may be used again.
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
