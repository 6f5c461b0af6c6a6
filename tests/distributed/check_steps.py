"""F and D on parameters that are cut in any way take the steps of one rank with whole parameters, bit for bit."""

import functools
import hashlib
from unittest import mock

import pytest
import torch
from cut_models import WAYS, child_of, equal_parts, full, given, go, like, tiny
from helpers import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from childtune_fast import ChildAdamW
from childtune_fast.ops import shards

STEPS = range(3)
BACKENDS = ("native", "torch")
D = {"child": child_of}
OPTIONS = {
    "F": {"seed": 3},
    "F, clipped": {"seed": 3, "max_grad_norm": 1.0},
    "F, amsgrad": {"seed": 3, "amsgrad": True, "reserve_p": 0.5},
    "plain": {"reserve_p": 1.0},
    "D": D,
    "D, clipped": {**D, "max_grad_norm": 1.0},
    "D, norm of the child network": {**D, "max_grad_norm": 1.0, "norm_of": "child"},
    "D, all decayed, amsgrad": {**D, "decay": "all", "amsgrad": True},
    "D, published code": {**D, "variant": "hf"},
}


def optimizer_of(model, options, child=None, **more):
    options = {"lr": 0.05, **options, **more}
    if "child" in options:
        options["child"] = options["child"](model) if child is None else child
    return ChildAdamW(model.named_parameters(), **options)


@functools.cache
def expected(name, sizes, dtype, backend):
    model = tiny(dtype, **dict(sizes))
    optimizer = optimizer_of(model, OPTIONS[name], backend=backend)
    go(model, optimizer, STEPS)
    return [p.detach() for p in model.parameters()], optimizer


def assert_same_weights(model, weights, *what):
    for (name, param), weight in zip(model.named_parameters(), weights, strict=True):
        assert equal_parts(param, weight), (*what, name)


def cases():
    """Every way and option. In torch, steps take longer, and differ only in who computes them: the ways with few."""
    for way in WAYS:
        for name in OPTIONS:
            yield way, name, "native", torch.float32
        for name in ("F", "D"):
            yield way, name, "native", torch.bfloat16
            yield way, name, "torch", torch.float32
    for name in OPTIONS:
        yield "FSDP2", name, "torch", torch.bfloat16


def trajectories_are_those_of_one_rank(rank, world, folder):
    for way, name, backend, dtype in cases():
        cut, sizes = WAYS[way]
        model = tiny(dtype, **sizes)
        child = child_of(model) if "child" in OPTIONS[name] else None
        optimizer = optimizer_of(cut(model, world), OPTIONS[name], child, backend=backend)
        go(model, optimizer, STEPS)
        weights, alone = expected(name, tuple(sizes.items()), dtype, backend)
        assert_same_weights(model, weights, way, name, backend, dtype)
        assert optimizer.param_groups[0]["child_fingerprint"] == alone.param_groups[0]["child_fingerprint"]
        assert repr(optimizer) == repr(alone)
        assert_same_state(optimizer, alone, way, name, backend)


def assert_same_state(optimizer, alone, *what):
    """Saved, that of a DTensor is dense; in memory, that of a masked one holds the child weights of its part alone."""
    ours, theirs = optimizer.state_dict()["state"], alone.dense_state_dict()["state"]
    masks = {i: mask for i, mask in enumerate(map(alone.child_masks.get, alone.param_groups[0]["params"])) if mask}
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        state, saved = optimizer.state[param], ours[i]
        if isinstance(param, DTensor):
            averages = [key for key in saved if "avg" in key]
            assert all(saved[key].placements == param.placements for key in averages)
            assert all(equal_parts(saved[key], theirs[i][key]) for key in averages), (*what, i)
            assert float(saved["step"]) == float(theirs[i]["step"])
            if i in masks:
                assert equal_parts(saved["child_mask"], masks[i].unpack())
                assert state["exp_avg"].shape == (int(saved["child_mask"].to_local().sum()),)


def gradients_placed_unlike_their_parameter(rank, world, folder):
    """Partial sums, as sequence parallelism leaves them, and shards of another dimension: as AdamW gets them."""
    mesh = init_device_mesh("cpu", (world,))
    for backend in BACKENDS:
        for options in ({"seed": 3}, {"reserve_p": 1.0}, {"seed": 3, "max_grad_norm": 0.5}):
            for placement, of_grad in ((Replicate(), Partial()), (Shard(0), Partial()), (Shard(0), Shard(1))):
                param = torch.nn.Parameter(distribute_tensor(given((8, 4), 1), mesh, [placement]))
                alone = torch.nn.Parameter(given((8, 4), 1))
                optimizers = [ChildAdamW([p], lr=0.1, backend=backend, **options) for p in (param, alone)]
                for step in range(3):
                    parts = [given((8, 4), 100 * step + part) for part in range(world)]
                    # Numbers of few bits, so that their sum does not depend on the order.
                    parts = [(part * 64).round() / 64 for part in parts]
                    alone.grad = sum(parts)
                    if of_grad == Partial():
                        param.grad = DTensor.from_local(parts[rank], mesh, [of_grad], run_check=False)
                    else:
                        param.grad = distribute_tensor(alone.grad, mesh, [of_grad])
                    for optimizer in optimizers:
                        optimizer.step()
                assert same_bits(full(param.detach()), alone.detach()), (backend, options, placement, of_grad)


def parts_of_several_pieces(rank, world, folder):
    """Experts cut in both of their matrices' dimensions, and a _StridedShard that leaves a rank rows here and there."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (1, world))
    shape = (3, 8, 6)
    for backend in BACKENDS:
        for placements in ([Shard(1), Shard(2)], [_StridedShard(1, split_factor=2), Replicate()]):
            param = torch.nn.Parameter(distribute_tensor(given(shape, 1), mesh, placements))
            alone = torch.nn.Parameter(given(shape, 1))
            for p in (param, alone):
                optimizer = ChildAdamW([p], lr=0.1, backend=backend, seed=3, amsgrad=True)
                for step in range(3):
                    p.grad = like(given(shape, 10 + step), p)
                    optimizer.step()
                assert float(optimizer.state[p]["step"]) == 3
            assert same_bits(full(param.detach()), alone.detach()), (backend, placements)


def a_rank_without_a_gradient_takes_part_in_the_norm(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    for of_rank in range(world):
        param, other = (torch.nn.Parameter(distribute_tensor(given((8, 3), 1), mesh, [Shard(0)])) for _ in range(2))
        optimizer = ChildAdamW([param, other], lr=0.1, seed=3, max_grad_norm=0.5)
        if rank == of_rank:
            param.grad = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
        assert (len(optimizer.state) == 1) == (rank == of_rank)


def an_infinity_skips_the_step_on_all_ranks(rank, world, folder):
    """As GradScaler tells it, here to one rank alone, which could otherwise leave the others waiting for the norm."""
    mesh = init_device_mesh("cpu", (world,))
    param = torch.nn.Parameter(distribute_tensor(given((8, 3), 1), mesh, [Shard(0)]))
    before = param.to_local().clone()
    optimizer = ChildAdamW([param], lr=0.1, seed=3, max_grad_norm=0.5)
    for asked in (True, False):
        param.grad = distribute_tensor(given((8, 3), 2), mesh, [Shard(0)])
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(asked and rank == world - 1))
        optimizer.step()
        assert same_bits(param.to_local().detach(), before) == asked
        assert (len(optimizer.state) == 0) == asked


def a_rank_that_raises_leaves_no_other_waiting(rank, world, folder):
    """An error before the sum of the norm, on one rank alone: in what a step is given, and in a check of it."""
    mesh = init_device_mesh("cpu", (world,))
    for backend, key, damaged in (("native", "exp_avg_sq", None), ("torch", "step", torch.tensor(-1.0))):
        param = torch.nn.Parameter(distribute_tensor(given((8, 3), 1), mesh, [Shard(0)]))
        optimizer = ChildAdamW([param], lr=0.1, seed=3, max_grad_norm=0.5, backend=backend)
        param.grad = distribute_tensor(given((8, 3), 2), mesh, [Shard(0)])
        optimizer.step()
        before = param.to_local().clone()
        last = rank == world - 1
        if last:
            optimizer.state[param][key] = damaged
        if last and damaged is None:
            del optimizer.state[param][key]
        with pytest.raises(ValueError if last else RuntimeError, match="ChildAdamW: ") as caught:
            optimizer.step()
        assert last or "another one raised" in str(caught.value)
        assert same_bits(param.to_local().detach(), before)


def autograd_notices_a_step_between_forward_and_backward(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    for backend in BACKENDS:
        param = torch.nn.Parameter(distribute_tensor(given((8, 8), 1), mesh, [Replicate()]))
        x = distribute_tensor(given((8, 8), 2), mesh, [Replicate()]).requires_grad_()
        optimizer = ChildAdamW([param], seed=3, backend=backend)
        loss = (x @ param).square().sum()
        param.grad = distribute_tensor(given((8, 8), 3), mesh, [Replicate()])
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def what_cannot_be_honoured_is_refused_when_the_optimizer_is_made(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False))
    with pytest.raises(ValueError, match=r"must be sharded or replicated \(got one that is placed as P"):
        ChildAdamW([partial])
    param = torch.nn.Parameter(distribute_tensor(given((8, 3), 1), mesh, [Shard(0)]))
    optimizer = ChildAdamW([param], seed=3)
    before = param.to_local().clone()
    param.grad = distribute_tensor(given((8, 3), 2), mesh, [Shard(0)])
    optimizer.step()
    assert not same_bits(param.to_local().detach(), before)


def sharding_after_the_optimizer_was_made(rank, world, folder):
    """With the parameters put into the groups as accelerate's prepare does it: F and D go on, on the ranks' parts."""
    for backend in BACKENDS:
        for name in ("F", "D", "D, clipped"):
            model = tiny()
            optimizer = optimizer_of(model, OPTIONS[name], backend=backend)
            WAYS["FSDP2"][0](model, world)
            optimizer.param_groups[0]["params"] = list(model.parameters())
            go(model, optimizer, STEPS)
            assert_same_weights(model, expected(name, (), torch.float32, backend)[0], backend, name)


def a_mask_that_was_cut_otherwise_is_refused(rank, world, folder):
    if world == 1:
        return
    mesh = init_device_mesh("cpu", (world,))
    model = torch.nn.Linear(8, 8, bias=False)
    child = child_of_linear(model)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    optimizer = ChildAdamW(model.parameters(), child=child)
    optimizer.load_state_dict(optimizer.state_dict())
    mask = optimizer.child_masks[model.weight]
    other = torch.nn.Parameter(distribute_tensor(full(model.weight.detach()), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="must stay sharded as it was"):
        type(mask).of(mask, other)


def child_of_linear(model):
    from childtune_fast import ChildNetwork

    return ChildNetwork.random(model, reserve_p=0.3, seed=1, maskable="weight")


def a_child_network_replaced_amid_training(rank, world, folder):
    weights = []
    for cut in (WAYS["whole"][0], WAYS["FSDP2"][0]):
        model = tiny()
        first, second = child_of(model), child_of(tiny())
        masks = {name: ~mask for name, mask in second.masks().items()}
        cut(model, world)
        optimizer = ChildAdamW(model.named_parameters(), lr=0.05, child=first)
        go(model, optimizer, range(2))
        optimizer.replace_child(type(first).from_masks(model, masks))
        go(model, optimizer, range(2, 4))
        weights.append([full(p.detach()) for p in model.parameters()])
    assert all(map(same_bits, *weights))


def what_does_not_change_is_computed_once(rank, world, folder):
    """Which part a rank holds, for all steps; and the hash of whole masks, for all checkpoints."""
    for name in ("F, clipped", "D"):
        model = tiny()
        child = child_of(model) if name == "D" else None
        optimizer = optimizer_of(WAYS["FSDP2"][0](model, world), OPTIONS[name], child)
        go(model, optimizer, range(2))
        optimizer.state_dict()
        hashes, computed = mock.Mock(wraps=hashlib.sha256), mock.Mock(wraps=shards.LocalPart.pieces)
        with (
            mock.patch.object(hashlib, "sha256", hashes),
            mock.patch.object(shards.LocalPart, "pieces", computed),
            mock.patch.object(shards, "local_part", computed),
        ):
            go(model, optimizer, range(2, 4))
            optimizer.state_dict()
        assert hashes.call_count == computed.call_count == 0


CHECKS = (
    what_does_not_change_is_computed_once,
    trajectories_are_those_of_one_rank,
    gradients_placed_unlike_their_parameter,
    parts_of_several_pieces,
    a_rank_without_a_gradient_takes_part_in_the_norm,
    an_infinity_skips_the_step_on_all_ranks,
    a_rank_that_raises_leaves_no_other_waiting,
    autograd_notices_a_step_between_forward_and_backward,
    what_cannot_be_honoured_is_refused_when_the_optimizer_is_made,
    sharding_after_the_optimizer_was_made,
    a_mask_that_was_cut_otherwise_is_refused,
    a_child_network_replaced_amid_training,
)
