"""benchmarks.scale counts what ranks really hold."""

import pytest
import torch
from cut_models import given, local
from torch.distributed.fsdp import fully_shard

from benchmarks import scale
from childtune_fast import ChildAdamW, ChildNetwork, FisherAccumulator

P = 0.3


def bytes_of(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def averages_in(states):
    return [value for state in states for key, value in state.items() if key.startswith("exp_avg")]


def counts_are_what_ranks_hold(rank, world, folder):
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False), torch.nn.Linear(512, 1001))
    masked = ["0.weight", "1.weight"]
    child = ChildNetwork.random(model, reserve_p=P, seed=1, maskable=masked.__contains__)
    expected = scale.held(scale.parts(model.named_parameters(), world, masked), P, 4)
    params = list(fully_shard(model).parameters())
    plain, of_d = ChildAdamW(params, reserve_p=P, seed=1), ChildAdamW(params, child=child)
    model(given((4, 256), rank)).square().sum().backward()
    for optimizer in (plain, of_d):
        optimizer.step()
    fisher = FisherAccumulator(model, names=masked.__contains__)
    fisher.update()
    masks = of_d.child_masks.values()
    found = {
        "parameters": bytes_of(params),
        "gradients": bytes_of(p.grad for p in params),
        "state of AdamW or F": bytes_of(averages_in(plain.state.values())),
        "state of D": bytes_of(averages_in(of_d.state.values())),
        "its part of the masks": bytes_of(tensor for mask in masks for tensor in (mask.bits, mask.offsets)),
        "whole masks, on the host": bytes_of(t for mask in child.packed.values() for t in (mask.bits, mask.offsets)),
        "Fisher scores": bytes_of(fisher.scores().values()),
    }
    saved = of_d.state_dict()["state"].values()
    dense = averages_in(saved) + [state["child_mask"] for state in saved if "child_mask" in state]
    found["state_dict() of D, while it is saved"] = bytes_of(dense)
    if rank == 0:
        found["the selection, beside them"] = expected["the selection, beside them"]  # check_selection.check_memory
        assert found == pytest.approx(expected, rel=0.01)
    assert bytes_of(params) <= expected["parameters"]


CHECKS = (counts_are_what_ranks_hold,)
