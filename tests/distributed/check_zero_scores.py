"""Checks on ranks: scores of 0 are counted over all ranks, and all of them raise, or warn in the same words."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from check_child import WAYS, WIDTH, as_dtensors
from models import Tiny, random_scores
from sharded_models import estimate, exact_batches, exact_model, under_fsdp

from childtune_fast import ChildNetwork


def messages_of(model, scores, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ChildNetwork.from_scores(model, scores, **options)
    return [str(warning.message) for warning in found if "ChildNetwork" in str(warning.message)]


def whole_scores(kind):
    """Scores whose zeros one rank alone may hold: at the end of each tensor, in whole tensors, or none."""
    scores = random_scores(Tiny(WIDTH))
    for i, tensor in enumerate(scores.values()):
        if kind == "ends":
            tensor.view(-1)[len(tensor.view(-1)) // 4 :] = 0
        elif kind == "tensors" and i % 3:
            tensor.zero_()
    return scores


def check_zeros_are_counted_over_ranks(rank, world, folder):
    told = 0
    for way in WAYS:
        model = way(world, Tiny(WIDTH))
        for kind, scope in (("ends", "global"), ("tensors", "tensor"), ("none", "global")):
            options = {"reserve_p": 0.6, "scope": scope}
            whole = whole_scores(kind)
            expected = messages_of(Tiny(WIDTH), whole, **options)
            assert messages_of(model, as_dtensors(whole, model), **options) == expected, (way, kind, scope)
            told += len(expected)
    assert told == 2 * len(WAYS)


def check_all_ranks_refuse_zeros(rank, world, folder):
    """One score above 0, on one rank, is enough for all of them."""
    for way in WAYS:
        model = way(world, Tiny(WIDTH))
        whole = {name: torch.zeros_like(tensor) for name, tensor in whole_scores("none").items()}
        for choose, scope in ((ChildNetwork.from_scores, "tensor"), (ChildNetwork.lowest, "global")):
            with pytest.raises(ValueError, match="only zeros in 12 tensors"):
                choose(model, as_dtensors(whole, model), reserve_p=0.3, scope=scope)
        whole["blocks.1.mlp.2.weight"][-1, -1] = 1
        (message,) = messages_of(model, as_dtensors(whole, model), reserve_p=0.3)
        assert re.search(r"got \S+ kept, 1 of .*; 11 tensors score 0 as a whole", message)


def check_all_ranks_refuse_an_estimate_of_zeros(rank, world, folder):
    """The batches of one rank have a gradient, or none has."""
    for last in (0.0, 1.0):
        model = under_fsdp(exact_model())
        batches = exact_batches([0], count=1)
        batches[0]["c"] *= last * (rank == world - 1)
        if last:
            assert estimate(model, batches)
        else:
            with pytest.raises(ValueError, match="the scored weights must change the loss"):
                estimate(model, batches)
    dist.barrier()


CHECKS = (
    check_zeros_are_counted_over_ranks,
    check_all_ranks_refuse_zeros,
    check_all_ranks_refuse_an_estimate_of_zeros,
)
