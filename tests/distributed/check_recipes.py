"""Whole loops over ranks, each with its own part of the data, as docs/scale.md shows them; what cannot wrap them."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cut_models import batch, full, given, tiny
from helpers import same_bits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from childtune_fast import ChildAdamW, ChildNetwork, FisherAccumulator, estimate_fisher

BATCHES = range(3)
LR = 0.05
CLOSE = LR / 50  # gradients are added in another order; a weight that another mask moves is off by a whole step


def loss_of(model, examples):
    ids, labels = examples
    return cross_entropy(model(ids), labels)


def part(number, rank, world):
    """A rank's share of a batch; the gradients' mean over ranks is then the gradient of the batch."""
    return [tensor[rank::world] for tensor in batch(number)]


def steps(model, optimizer, batches):
    for examples in batches:
        loss_of(model, examples).backward()
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def alone(mode, parts):
    """What one rank comes to. The Fisher scores are of whole batches, or of each of so many parts of them."""
    model, child = tiny(), None
    if mode == "D":
        pieces = [part(number, i, parts) for number in BATCHES for i in range(parts)]
        scores = estimate_fisher(model, pieces, loss_fn=loss_of, progress=False)
        child = ChildNetwork.from_scores(model, scores, reserve_p=0.3)
    optimizer = ChildAdamW(model.parameters(), lr=LR, **({"seed": 3} if child is None else {"child": child}))
    steps(model, optimizer, [batch(number) for number in BATCHES] * 2)
    return [p.detach() for p in model.parameters()], child


def assert_as_alone(model, child, mode, parts):
    weights, expected = alone(mode, parts)
    assert child is None or child.overlap(expected) > 0.99
    changed = 0  # weights that rounding has put on the other side of the limit
    for param, weight in zip(model.parameters(), weights, strict=True):
        changed += int(((full(param.detach()) - weight).abs() > CLOSE).sum())
    assert changed <= 0.01 * sum(weight.numel() for weight in weights), (mode, changed)


def data_parallel(rank, world, folder):
    batches = [part(number, rank, world) for number in BATCHES]
    for mode in "FD":
        model, child = DistributedDataParallel(tiny()), None
        if mode == "D":
            fisher = FisherAccumulator(model)
            for examples in batches:
                model.zero_grad()
                with model.no_sync():  # gradients of this rank's batch
                    loss_of(model, examples).backward()
                fisher.update()
            model.zero_grad()
            fisher.all_reduce()
            child = ChildNetwork.from_scores(model, fisher.scores(), reserve_p=0.3)
        options = {"seed": 3} if child is None else {"child": child}
        optimizer = ChildAdamW(model.named_parameters(), lr=LR, **options)
        steps(model, optimizer, batches * 2)
        assert_as_alone(model, child, mode, parts=world)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        everyones = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(everyones, weights)
        assert all(same_bits(other, weights) for other in everyones)


def fsdp2(rank, world, folder):
    batches = [part(number, rank, world) for number in BATCHES]
    for mode in "FD":
        path = folder / f"{mode} of {world}"
        path.mkdir(exist_ok=True)

        def sharded():
            model = tiny()
            for layer in model.layers:
                fully_shard(layer)
            return fully_shard(model)

        def saved(model, optimizer):
            model_state, optimizer_state = get_state_dict(model, optimizer)
            return {"model": model_state, "optimizer": optimizer_state}

        model, child = sharded(), None
        if mode == "D":
            scores = estimate_fisher(model, batches, loss_fn=loss_of, progress=False)
            child = ChildNetwork.from_scores(model, scores, reserve_p=0.3)
            if rank == 0:
                child.save(path / "child.safetensors")
        optimizer = ChildAdamW(model.parameters(), lr=LR, **({"seed": 3} if child is None else {"child": child}))
        steps(model, optimizer, batches)
        dcp.save(saved(model, optimizer), checkpoint_id=path / "checkpoint")
        steps(model, optimizer, batches)
        assert_as_alone(model, child, mode, parts=1)

        resumed = sharded()
        options = {"child": ChildNetwork.load(path / "child.safetensors", resumed)} if mode == "D" else {"seed": 3}
        optimizer = ChildAdamW(resumed.parameters(), lr=LR, **options)
        state = saved(resumed, optimizer)
        dcp.load(state, checkpoint_id=path / "checkpoint")
        set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        steps(resumed, optimizer, batches)
        for param, expected in zip(resumed.parameters(), model.parameters(), strict=True):
            assert same_bits(full(param.detach()), full(expected.detach())), mode


def zero_redundancy_optimizer(rank, world, folder):
    """Each rank steps some parameters: plain AdamW does so rightly, and all that looks at the others is refused."""

    def made(**options):
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ChildAdamW, lr=LR, **options)

    model, whole = tiny(), tiny()
    child = ChildNetwork.random(model, reserve_p=0.3, seed=1)
    for options, got in (
        ({}, "reserve_p=0.3"),
        ({"child": child}, "a child network"),
        ({"reserve_p": 1.0, "max_grad_norm": 0.5}, "max_grad_norm=0.5"),
    ):
        with pytest.raises(ValueError, match=rf"ZeroRedundancyOptimizer .*\(got {got}\); shard .* fully_shard instead"):
            made(**options)
    optimizer, alone = made(reserve_p=1.0), ChildAdamW(whole.parameters(), lr=LR, reserve_p=1.0)
    for step in range(3):
        for number, (p, q) in enumerate(zip(model.parameters(), whole.parameters(), strict=True)):
            p.grad, q.grad = (given(p.shape, 100 * step + number) for _ in range(2))
        optimizer.step()
        alone.step()
    assert all(map(same_bits, model.parameters(), whole.parameters()))
    with pytest.raises(ValueError, match=r"got reserve_p=0.5"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "reserve_p": 0.5})


CHECKS = (data_parallel, fsdp2, zero_redundancy_optimizer)
