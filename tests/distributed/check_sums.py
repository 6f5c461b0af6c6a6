"""Sums of squared gradients over ranks: data-parallel ones are added; sharded ones are saved, loaded and merged."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import (
    BATCHES,
    CLIP,
    assert_same,
    estimate,
    exact_batches,
    exact_loss,
    exact_model,
    mesh_of,
    placed_as,
    under_fsdp,
    under_tp,
    whole,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from childtune_fast import FisherAccumulator

# ---- Data-parallel ranks -------------------------------------------------------------------------------------------


def check_ddp(rank, world, folder):
    expected = estimate(exact_model(), exact_batches([rank]))
    model = DistributedDataParallel(exact_model())
    assert_same(estimate(model, exact_batches([rank]), names=r"^[012]\."), expected)
    if rank == 0:  # no rank waits for another one
        assert_same(estimate(model, exact_batches([rank])), expected)
    of_means, of_own = FisherAccumulator(model), FisherAccumulator(model)
    for batch in exact_batches([rank]):
        model.zero_grad()
        exact_loss(model, batch).backward()
        of_means.update()
        model.zero_grad()
        with model.no_sync():
            exact_loss(model, batch).backward()
        of_own.update()
    assert_same(of_means.scores(), estimate(exact_model(), exact_batches(range(world))))
    assert_same(of_own.scores(), expected)
    of_own.all_reduce()
    everything = [batch for r in range(world) for batch in exact_batches([r])]
    assert_same(of_own.scores(), estimate(exact_model(), everything))


def check_all_reduce(rank, world, folder):
    model = exact_model()
    parts = [accumulated(model, exact_batches([r], 1 + r)) for r in range(world)]  # of different sizes
    total = accumulated(exact_model(), [batch for r in range(world) for batch in exact_batches([r], 1 + r)])
    parts[rank].all_reduce(dist.group.WORLD)
    assert_same(parts[rank].scores(), total.scores())
    assert parts[rank].state_dict()["weight"] == total.state_dict()["weight"]
    if world > 1:
        group = dist.new_group([0, 1])
        if rank > 1:
            with pytest.raises(ValueError, match="the rank must be in the group"):
                parts[rank].all_reduce(group)
        else:
            part = accumulated(model, exact_batches([rank]))
            part.all_reduce(group)
            assert_same(part.scores(), accumulated(exact_model(), exact_batches([0]) + exact_batches([1])).scores())
    empty = FisherAccumulator(model) if rank else accumulated(model, exact_batches([0]))
    empty.all_reduce()
    assert_same(empty.scores(), accumulated(exact_model(), exact_batches([0])).scores())

    last = rank == world - 1
    damaged = accumulated(model, exact_batches([rank]))
    damaged._sums.damaged = last
    wrong = {rf"those of rank {world - 1} hold a part .*reset\(\) there": damaged}
    if world > 1:
        other = FisherAccumulator(model, names="weight") if last else FisherAccumulator(model)
        wrong[r"the same parameters \(got '0.bias' of shape \(8,\) on rank 0, None on rank"] = other
        clipped = FisherAccumulator(model, grad_clip=1.0 if last else None)
        wrong[rf"one grad_clip \(got None on rank 0, 1.0 on rank {world - 1}"] = clipped
    wrong[r"parameters must be whole \(got sharded ones .*leave all_reduce\(\) out"] = FisherAccumulator(
        under_fsdp(exact_model())
    )
    for words, fisher in wrong.items():
        before = {name: sums.clone() for name, sums in fisher._sums.sums.items()}
        with pytest.raises(ValueError, match=words):
            fisher.all_reduce()
        assert_same(fisher._sums.sums, before)


def accumulated(model, batches, **options):
    fisher = FisherAccumulator(model, **options)
    for batch in batches:
        model.zero_grad()
        exact_loss(model, batch).backward()
        fisher.update()
    return fisher


# ---- Sums that are saved, loaded and merged ------------------------------------------------------------------------


def check_sums_are_saved_and_loaded(rank, world, folder):
    """Through torch.distributed.checkpoint, onto models that are cut otherwise, and whole."""
    model = under_fsdp(exact_model())
    fisher = accumulated(model, exact_batches([rank]), grad_clip=CLIP)
    expected = accumulated(exact_model(), exact_batches(range(world)), grad_clip=CLIP).scores()
    dcp.save({"fisher": fisher.state_dict()}, checkpoint_id=folder / "scores")
    targets = [under_fsdp(exact_model()), under_tp(exact_model(), mesh_of(world)), exact_model()]
    targets += [under_fsdp(exact_model(), mesh_of(2, 2))] if world == 4 else []
    for target in targets:
        loaded = FisherAccumulator(target, grad_clip=CLIP)
        state = {"fisher": loaded.state_dict()}
        dcp.load(state, checkpoint_id=folder / "scores")
        loaded.load_state_dict(state["fisher"])
        assert_same(loaded.scores(), expected)
        for source in (fisher, loaded, accumulated(exact_model(), exact_batches(range(world)), grad_clip=CLIP)):
            other = FisherAccumulator(target, grad_clip=CLIP)
            other.load_state_dict(source.state_dict())
            assert_same(other.scores(), expected)
            other.merge(source)
            assert_same(other.scores(), expected)
            assert other.state_dict()["weight"] == 2 * BATCHES
            assert placed_as(other.scores(), target)


def check_foreign_sums_are_refused_by_all_ranks(rank, world, folder):
    model, last = under_fsdp(exact_model()), rank == world - 1
    fisher = accumulated(model, exact_batches([rank]))
    before = fisher.scores()

    def damaged(**changes):
        return {**fisher.state_dict(), **(changes if last else {})}

    name, sums = next(iter(fisher.state_dict()["sums"].items()))
    nan = distribute_tensor(torch.full(sums.shape, torch.nan), sums.device_mesh, [Shard(0)])
    short = {name: whole({"": sums})[""][:-1]}
    for words, state in (
        ("weight -1.0", damaged(weight=-1.0)),
        ("sums and weight must be numbers", damaged(sums={**fisher.state_dict()["sums"], name: nan})),
        (r"shape \(8, 6\) here, \(7, 6\) there", damaged(sums={**fisher.state_dict()["sums"], **short})),
        ("one grad_clip", damaged(grad_clip=1.0)),
    ):
        with pytest.raises(ValueError, match=words):
            fisher.load_state_dict(state)
        assert_same(fisher.scores(), before)
    other = FisherAccumulator(model, grad_clip=1.0 if last else None)
    with pytest.raises(ValueError, match="merge: both must have one grad_clip"):
        fisher.merge(other)
    assert_same(fisher.scores(), before)
    assert isinstance(model, FSDPModule)


CHECKS = (
    check_ddp,
    check_all_reduce,
    check_sums_are_saved_and_loaded,
    check_foreign_sums_are_refused_by_all_ranks,
)
