"""Fisher scores of models that are cut over ranks, against those of one rank."""

import pytest
import torch
from fisher_models import loss_fn, make_batches, make_model
from helpers import same_bits
from sharded_models import (
    BATCHES,
    CLIP,
    SIZE,
    Normed,
    assert_same,
    counted_additions,
    cut_models,
    estimate,
    exact_batches,
    exact_loss,
    exact_model,
    mesh_of,
    never,
    placed_as,
    sequences,
    under_fsdp,
    under_sequence_parallel,
    under_tp,
    whole,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from childtune_fast import FisherAccumulator
from childtune_fast.ops import shards
from childtune_fast.ops.select import top_k

# ---- The same scores as on one rank --------------------------------------------------------------------------------


def check_scores_are_those_of_one_rank(rank, world, folder):
    """Gradients of whole numbers: bit for bit, whatever the order of the sums over ranks."""
    for way, (model, mine, everyones) in cut_models(rank, world).items():
        for options in ({}, {"grad_clip": CLIP}, {"offload": "cpu"})[: 3 if way == "FSDP2" else 2]:
            expected = estimate(exact_model(), exact_batches(everyones), **options)
            with counted_additions() as counts:
                scores = estimate(model, exact_batches(mine), **options)
            assert_same(scores, expected)
            assert placed_as(scores, model), way
            assert set(counts.values()) == {BATCHES}
        assert all(param.grad is None for param in model.parameters())
        fisher = FisherAccumulator(model, grad_clip=CLIP)
        for batch in exact_batches(mine):
            model.zero_grad()
            (exact_loss(model, batch) * 2).backward()
            fisher.update(grad_scale=2.0)
        assert_same(fisher.scores(), estimate(exact_model(), exact_batches(everyones), grad_clip=CLIP))
        assert placed_as(fisher.scores(), model)


def check_clipping_clips_some(rank, world, folder):
    """What the checks with `grad_clip` rest on."""
    clipped, plain = (estimate(exact_model(), exact_batches([0]), grad_clip=clip) for clip in (CLIP, None))
    assert {same_bits(clipped[name], plain[name]) for name in plain} == {False, True}


def check_chosen_weights_are_those_of_one_rank(rank, world, folder):
    """Gradients that are rounded: docs/numerics.md says by how much scores then differ."""
    batches = [make_batches(seed=r) for r in range(world)]
    joined = [
        {"x": torch.cat([b["x"] for b in parts]), "y": [torch.cat([b["y"][0] for b in parts])]}
        for parts in zip(*batches, strict=True)
    ]
    for grad_clip in (None, 0.05):
        options = {"loss_fn": loss_fn, "grad_clip": grad_clip}
        expected = estimate(make_model(), joined, **options)
        model = make_model()
        fully_shard(model[0])
        scores = whole(estimate(fully_shard(model), batches[rank], **options))
        for name, score in scores.items():
            error = (score - expected[name]).abs().max() / expected[name].max()
            assert error < 2e-6, (name, error)
        k = round(0.3 * sum(score.numel() for score in expected.values()))
        masks = zip(top_k(scores, k).values(), top_k(expected, k).values(), strict=True)
        assert all(torch.equal(a.bits, b.bits) for a, b in masks)


def check_partial_gradients_are_squared_whole(rank, world, folder):
    """Under sequence parallelism a rank has a part of the sum that a norm's gradient is."""
    mesh, loss = mesh_of(world), lambda model, x: (model(x) ** 2).mean()
    for grad_clip in (None, 1e-3):
        options = {"loss_fn": loss, "grad_clip": grad_clip}
        expected = estimate(Normed(), sequences(), **options)
        model = under_sequence_parallel(Normed(), mesh)
        scores = whole(estimate(model, sequences(mesh), **options))
        fisher = FisherAccumulator(model, grad_clip=grad_clip)
        for x in sequences(mesh):
            model.zero_grad()
            loss(model, x).backward()
            fisher.update()
        for found in (scores, whole(fisher.scores())):
            for name, score in found.items():
                torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-12)
        norm = next(iter(fisher._sums.params.values()))
        assert world == 1 or norm.grad.placements != norm.placements  # what this check is about


def check_examples_one_by_one(rank, world, folder):
    one_by_one = [{k: v[i : i + 1] for k, v in b.items()} for b in exact_batches([0]) for i in range(SIZE)]
    scores = estimate(under_tp(exact_model(), mesh_of(world)), exact_batches([0]), per_example=True)
    assert_same(scores, estimate(exact_model(), one_by_one))
    with pytest.raises(ValueError, match=r"per_example=True each example .*fully_shard.*; pass per_example=False, or"):
        estimate(under_fsdp(exact_model()), never(), per_example=True)


def check_values_stay_on_their_device(rank, world, folder):
    """As with `offload`, and as FSDP2 has it: on a mesh of GPUs, values in the CPU's memory."""
    gpus = DeviceMesh("cuda", list(range(world)), _init_backend=False)
    param = distribute_tensor(torch.ones(7, 3), mesh_of(world), [Shard(0)])
    spec = DTensorSpec(gpus, (Shard(0),), TensorMeta(param.shape, (3, 1), param.dtype))
    values = torch.rand(param.to_local().shape)
    score = shards.dtensor_like(values, DTensor(param.to_local(), spec, requires_grad=False))
    assert shards.local_tensor(score).data_ptr() == values.data_ptr()
    assert (score.shape, score.stride(), score.device_mesh) == ((7, 3), (3, 1), gpus)


CHECKS = (
    check_scores_are_those_of_one_rank,
    check_clipping_clips_some,
    check_chosen_weights_are_those_of_one_rank,
    check_partial_gradients_are_squared_whole,
    check_examples_one_by_one,
    check_values_stay_on_their_device,
)
