"""Checks on ranks: a child network of a sharded model is that of the whole model, made before or after sharding."""

import os
import re

import pytest
import torch
from models import Tiny, random_scores
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from childtune_fast import ChildNetwork
from childtune_fast.child import choice
from childtune_fast.child.choice import random_scores as chosen_at_random
from childtune_fast.child.maskable import maskable_parameters
from childtune_fast.ops.shards import dtensor_like, local_part, local_tensor

WIDTH = 10  # uneven over 4 ranks


def sharded(world, model):
    fully_shard_all(model, init_device_mesh("cpu", (world,)))
    return model


def fully_shard_all(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def with_tensor_parallel(world, model):
    """Tensor parallelism inside of FSDP2, on two dimensions where there are four ranks; norms and biases are whole."""
    mesh = init_device_mesh("cpu", (max(world // 2, 1), min(world, 2)), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()})
    fully_shard_all(model, mesh["dp"])
    return model


def with_copies(world, model):
    mesh = init_device_mesh("cpu", (2 if world == 4 else 1, min(world, 2)), mesh_dim_names=("copies", "shard"))
    fully_shard_all(model, mesh)
    return model


WAYS = (sharded, with_tensor_parallel, with_copies)


def as_dtensors(whole, model):
    """Whole tensors, each cut as the parameter of that name."""
    params = dict(model.named_parameters())
    cut = {name: isinstance(params[name], DTensor) for name in whole}
    return {
        name: dtensor_like(local_part(params[name]).cut(tensor).contiguous(), params[name]) if cut[name] else tensor
        for name, tensor in whole.items()
    }


def check_choices(rank, world, folder):
    """Each way to make one gives the whole model's, after sharding as before it."""
    whole = Tiny(WIDTH)
    scores = random_scores(whole)
    masks = {name: tensor > 1 for name, tensor in scores.items() if "weight" in name}
    head = ChildNetwork.head_only(whole)
    for way in WAYS:
        model = way(world, Tiny(WIDTH))
        cut_scores, cut_masks = as_dtensors(scores, model), as_dtensors(masks, model)
        assert list(maskable_parameters(model)) == list(maskable_parameters(whole))
        for options in ({"reserve_p": 0.3}, {"reserve_p": 0.2, "scope": "tensor"}, {"reserve_p": 0.3, "maskable": "."}):
            for make in (ChildNetwork.from_scores, ChildNetwork.lowest):
                check_same(make(model, cut_scores, **options), make(whole, scores, **options), model)
            expected = ChildNetwork.random(whole, seed=5, **options)
            check_same(ChildNetwork.random(model, seed=5, **options), expected, model)
        expected = ChildNetwork.from_scores(whole, scores, reserve_p=0.3)
        check_same(ChildNetwork.from_scores(model, scores, reserve_p=0.3), expected, model)
        for given in (masks, cut_masks):
            check_same(ChildNetwork.from_masks(model, given), ChildNetwork.from_masks(whole, masks), model)
        check_same(ChildNetwork.head_only(model), head, model)


def check_same(found, expected, model):
    """Everything that a child network tells, and the masks that an optimizer gets for the model's parameters."""
    assert found.fingerprint == expected.fingerprint
    assert found.summary() == expected.summary()
    assert repr(found) == repr(expected)
    masks = found.masks()
    assert list(masks) == list(expected.packed)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.masks().items())
    assert found.overlap(expected) == expected.overlap(expected)
    assert found.union(expected).fingerprint == found.intersection(expected).fingerprint == expected.fingerprint
    for name, param in model.named_parameters():
        assert (found.mask_of(param) is None) == (name not in expected.packed)
        if name in expected.packed:
            mask = found.mask_of(param)
            assert mask.bits.is_cpu
            assert mask.shape == tuple(param.shape)
            assert torch.equal(mask.bits, expected.packed[name].bits)


def check_sharded_later(rank, world, folder):
    """One made before sharding serves after it, by the parameters' places and by their names, and is saved whole."""
    for number, way in enumerate(WAYS):
        model = Tiny(WIDTH)
        before = ChildNetwork.random(model, reserve_p=0.3, seed=1)
        way(world, model)
        check_same(before, ChildNetwork.random(Tiny(WIDTH), reserve_p=0.3, seed=1), model)
        other = ChildNetwork.random(Tiny(WIDTH), reserve_p=0.3, seed=1)
        for name, param in model.named_parameters():
            mask = other.mask_of(param, name)
            assert (mask is None) == (name not in before.packed)
            assert mask is None or torch.equal(mask.bits, before.packed[name].bits)
        path = os.path.join(folder, f"child {number} {world} {rank}.safetensors")
        ChildNetwork.random(model, reserve_p=0.3, seed=1).save(path)
        loaded = way(world, Tiny(WIDTH))
        check_same(ChildNetwork.load(path, loaded), before, loaded)
        assert ChildNetwork.load(path, Tiny(WIDTH)).fingerprint == before.fingerprint


def check_unsharded_root(rank, world, folder):
    """After an evaluation pass FSDP2 leaves the root's parameters whole until they are cut again: both are found."""

    class Root(Tiny):
        def forward(self, x):
            return self.classifier(self.embedding(x).mean(1))

    whole = Root(WIDTH)
    model = sharded(world, Root(WIDTH))
    model.eval()
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.int64))
    assert not isinstance(model.embedding.weight, DTensor)
    scores = random_scores(whole)
    expected = ChildNetwork.from_scores(whole, scores, reserve_p=0.3, maskable=".")
    found = [
        ChildNetwork.from_scores(model, given, reserve_p=0.3, maskable=".")
        for given in (scores, as_dtensors(scores, model))
    ]
    found.append(ChildNetwork.from_masks(model, expected.masks()))
    for child in found:
        check_same(child, expected, model)
    model.reshard()
    assert isinstance(model.embedding.weight, DTensor)
    for child in found:
        check_same(child, expected, model)


def check_random_scores(rank, world, folder):
    """A rank's scores are those of the whole parameter, also where it takes several draws, and of its part alone."""
    choice._CHUNK = 64
    for way in WAYS:
        model, whole = way(world, Tiny(WIDTH)), Tiny(WIDTH)
        expected = chosen_at_random(dict(whole.named_parameters()), 3)
        found = chosen_at_random(dict(model.named_parameters()), 3)
        for name, param in model.named_parameters():
            own, of_whole = found[name], expected[name]
            if isinstance(param, DTensor):
                assert own.placements == param.placements
                assert own.shape == param.shape
                assert local_tensor(own).untyped_storage().nbytes() == 4 * local_tensor(param).numel()
                own, of_whole = local_tensor(own), local_part(param).cut(of_whole)
            assert torch.equal(own, of_whole)
    choice._CHUNK = 1 << 18


def check_refusals(rank, world, folder):
    """Partial sums, deltas and another shape are refused in a sentence, and what the sentence advises works."""
    base, model = Tiny(WIDTH), sharded(world, Tiny(WIDTH))
    mesh = init_device_mesh("cpu", (world,))
    name, param = next(iter(maskable_parameters(model).items()))
    partial = DTensor.from_local(torch.ones(param.shape), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"scores must be whole, sharded or replicated \(got partial sums"):
        ChildNetwork.from_scores(model, {name: partial}, reserve_p=0.3, maskable=re.escape(name))
    again = partial.redistribute(mesh, [Shard(0)])
    assert ChildNetwork.from_scores(model, {name: again}, reserve_p=0.3, maskable=re.escape(name)).packed

    child = ChildNetwork.random(model, reserve_p=0.3, seed=0)
    with pytest.raises(ValueError, match=r"must have the shape .* of its mask \(got \(3,\)\)"):
        child.mask_of(torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)])), name)
    path = os.path.join(folder, f"delta {world} {rank}.safetensors")
    for given in ((model, base), (base, model), (base, model.state_dict())):
        with pytest.raises(ValueError, match=r"save_delta: the (model|base) must have whole tensors"):
            child.save_delta(path, *given)
    assert not os.path.exists(path)
    with torch.no_grad():
        local_tensor(param).add_(local_part(param).cut(child.masks()[name]).float())
    tuned = Tiny(WIDTH)
    tuned.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    child.save_delta(path, tuned, base)
    before = param.full_tensor()
    with pytest.raises(ValueError, match=r"apply_delta: the base model must have whole tensors"):
        ChildNetwork.apply_delta(path, model)
    assert torch.equal(param.full_tensor(), before)
    applied = Tiny(WIDTH)
    found = ChildNetwork.apply_delta(path, applied)
    sharded(world, applied)
    check_same(found, child, applied)
    assert torch.equal(dict(applied.named_parameters())[name].full_tensor(), before)


CHECKS = (
    check_choices,
    check_sharded_later,
    check_unsharded_root,
    check_random_scores,
    check_refusals,
)
