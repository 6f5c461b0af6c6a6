"""Checks on ranks: selection over scores that are cut in every way, against selection on whole tensors."""

import itertools
import math

import pytest
import torch
from dispatches import Dispatches
from scores import values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from childtune_fast.ops import radix, select_on_ranks
from childtune_fast.ops.packed_mask import pack
from childtune_fast.ops.select import top_k
from childtune_fast.ops.shards import dtensor_like, local_part, local_tensor, whole_tensor

SHAPES = ((5, 7), (1,), (64, 33), (3, 2, 50), (0, 3), (2049,), (130, 24), (2, 9))


def whole_scores(kind, shapes=SHAPES):
    pieces = values(sum(map(math.prod, shapes)), kind).split([math.prod(shape) for shape in shapes])
    return {f"tensor {i}": piece.view(shape) for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True))}


def cut(tensor, mesh, placements):
    """The tensor as a DTensor; a dimension that it does not have is not cut."""
    there = [Replicate() if getattr(p, "dim", 0) >= tensor.dim() else p for p in placements]
    return distribute_tensor(tensor, mesh, there)


def cut_in_turn(choices):
    """Cuts the first tensor in the first way of some, and so on; None leaves it whole."""

    def cut_all(scores, mesh):
        ways = itertools.cycle(choices)
        pairs = zip(scores.items(), ways, strict=False)
        return {name: tensor if way is None else cut(tensor, mesh, way) for (name, tensor), way in pairs}

    return cut_all


def cut_by_fsdp_and_tensor_parallel(scores, mesh):
    """Cuts matrices as FSDP2 cuts what tensor parallelism has cut, so that a rank's rows are apart."""
    found = {}
    for i, (name, tensor) in enumerate(scores.items()):
        found[name] = tensor
        if tensor.dim() == 2 and tensor.numel():
            model = nn.Sequential(nn.Linear(tensor.shape[1], tensor.shape[0], bias=False))
            style = (ColwiseParallel, RowwiseParallel)[i % 5 == 2]()
            param = fully_shard(parallelize_module(model, mesh["b"], {"0": style}), mesh=mesh["a"])[0].weight
            found[name] = dtensor_like(local_part(param).cut(tensor).contiguous(), param)
    assert any(isinstance(p, _StridedShard) for t in found.values() for p in getattr(t, "placements", ()))
    return found


S0, S1, R = Shard(0), Shard(1), Replicate()
LINE = {
    "Shard(0)": cut_in_turn([[S0]]),
    "Shard(1)": cut_in_turn([[S1]]),
    "replicated": cut_in_turn([[R]]),
    "mixed": cut_in_turn([[S0], None, [S1], [R], [S0]]),
}
SQUARE = {
    "HSDP": cut_in_turn([[R, S0]]),
    "over both dimensions": cut_in_turn([[S0, S0], [S0, S1], [S1, S0]]),
    "mixed in two dimensions": cut_in_turn([[S0, R], None, [R, S1], [R, R], [S1, S1]]),
    "FSDP2 x tensor parallel": cut_by_fsdp_and_tensor_parallel,
}


def layouts(world):
    line = init_device_mesh("cpu", (world,))
    found = [(name, line, cut_all) for name, cut_all in LINE.items()]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [(name, square, cut_all) for name, cut_all in SQUARE.items()]
    return found


def check_equal(found, expected, what):
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert found[name].shape == mask.shape, what
        assert torch.equal(found[name].bits, mask.bits), (what, name)


def check_selection(rank, world, folder):
    """Equal to selection on whole tensors, for scores with and without ties, in chunks that divide tensors."""
    select_on_ranks._CHUNK_BYTES, select_on_ranks._CHUNK = 128, 100
    cases = 0
    for layout, mesh, cut_all in layouts(world):
        scores = cut_all(whole_scores("normal"), mesh)
        assert all(torch.equal(whole_tensor(scores[name]), tensor) for name, tensor in whole_scores("normal").items())
        for kind in ("normal", "few values", "infinities and extremes"):
            whole = whole_scores(kind)
            scores, total = cut_all(whole, mesh), sum(tensor.numel() for tensor in whole.values())
            for largest, k in ((True, round(0.3 * total)), (False, round(0.6 * total))):
                expected = top_k(whole, k, largest=largest)
                check_equal(top_k(scores, k, largest=largest), expected, (layout, kind, k, largest))
                cases += 1
        for k in (0, total - 1, total):
            check_equal(top_k(scores, k), top_k(whole, k), (layout, k))
            cases += 1
    assert cases >= 36
    select_on_ranks._CHUNK_BYTES, select_on_ranks._CHUNK = 1 << 16, 1 << 16


def check_ties_of_one_tensor(rank, world, folder):
    """The limit falls at every kind of place in a tensor of equal scores: of the earlier index, the lower is taken."""
    for layout, mesh, cut_all in layouts(world):
        whole = {"matrix": torch.ones(64, 70), "vector": torch.ones(7)}
        scores = cut_all(whole, mesh)
        for k in (1, 35, 70 * 17 + 36, 64 * 70 - 1, 64 * 70 + 3):
            found = top_k(scores, k)
            assert torch.equal(found["matrix"].unpack().view(-1), torch.arange(64 * 70) < k), (layout, k)
            assert torch.equal(found["vector"].unpack(), torch.arange(7) < k - 64 * 70), (layout, k)


def check_dtypes_and_memory_formats(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (torch.bfloat16, torch.float16):
        whole = {"a": values(3000, "normal").view(50, 60).to(dtype), "b": values(77, "normal").to(dtype)}
        check_equal(top_k(cut_in_turn([[S0]])(whole, mesh), 900), top_k(whole, 900), dtype)
    strided = {"a": DTensor.from_local(torch.arange(6.0).view(2, 3).t() + 100 * rank, mesh, [S0])}
    check_equal(top_k(strided, 3 * world), top_k({"a": strided["a"].full_tensor()}, 3 * world), "strided")
    double = {"a": distribute_tensor(torch.zeros(8, dtype=torch.float64), mesh, [S0])}
    with pytest.raises(TypeError, match=r"got torch.float64 for 'a'"):
        top_k(double, 1)
    with pytest.raises(ValueError, match=r"between 0 and the number of scores, 8 \(got 9\)"):
        top_k(double, 9)


def check_nan(rank, world, folder):
    """A NaN that one rank holds raises on all ranks, with the name of the first tensor that has one."""
    for _, mesh, cut_all in layouts(world):
        whole = whole_scores("normal")
        whole["tensor 6"][-1, -1] = whole["tensor 7"][0, 0] = math.nan
        with pytest.raises(ValueError, match=r"got one or more for 'tensor 6'"):
            top_k(cut_all(whole, mesh), 10)


def check_ranks_that_disagree(rank, world, folder):
    """Ranks with other whole scores, or another k, all raise; none waits for another for ever."""
    mesh = init_device_mesh("cpu", (world,))
    whole = {"a": values(300, "normal"), "b": values(30, "normal")}
    scores = cut_in_turn([[S0], None])(whole, mesh)
    differing = {**scores, "b": whole["b"] + (rank == world - 1)}
    with_nan = {**scores, "b": whole["b"] / (rank != 0)}
    for given, k in ((differing, 10), (with_nan, 10), (scores, 10 + rank)):
        if world > 1:
            with pytest.raises(ValueError, match="scores must be the same on all ranks"):
                top_k(given, k)


def check_whole_masks(rank, world, folder):
    """A mask that is gathered in chunks is the whole one, however it is cut."""
    select_on_ranks._CHUNK_BYTES = 128
    for layout, mesh, cut_all in layouts(world):
        for name, scores in cut_all(whole_scores("normal", (*SHAPES, (4, 2051))), mesh).items():
            if isinstance(scores, DTensor):
                whole = scores.full_tensor() > 0
                found = select_on_ranks.whole_mask(pack(local_tensor(scores) > 0), scores)
                assert torch.equal(found.unpack(), whole), (layout, name)
                assert found.bits.is_cpu
    select_on_ranks._CHUNK_BYTES = 1 << 16


def check_memory(rank, world, folder):
    """Beside the whole masks, a rank takes chunks, and for its part of one tensor a bit and a count in a thousand."""
    radix._CHUNK_BLOCKS, select_on_ranks._CHUNK_BYTES, select_on_ranks._CHUNK = 16, 1 << 11, 1 << 10
    mesh = init_device_mesh("cpu", (world,))
    peaks = []
    for tensors, size in ((2, 1 << 17), (6, 1 << 17), (2, 1 << 19)):
        local = torch.linspace(-1, 1, size // world).round(decimals=1)
        scores = {str(i): DTensor.from_local(local, mesh, [S0]) for i in range(tensors)}
        with Dispatches(known=[local]) as dispatches:
            masks = top_k(scores, tensors * size // 3)
        whole = sum(mask.bits.nbytes + mask.offsets.nbytes for mask in masks.values())
        peaks.append(dispatches.peak - whole)
    radix._CHUNK_BLOCKS, select_on_ranks._CHUNK_BYTES, select_on_ranks._CHUNK = 1 << 10, 1 << 16, 1 << 16
    assert peaks[0] < 64 * 16 * 1024
    assert peaks[1] - peaks[0] < 4096
    assert peaks[2] - peaks[0] < (1 / 8 + 48 / 1024) * ((1 << 19) - (1 << 17)) / world + 4096


CHECKS = (
    check_selection,
    check_ties_of_one_tensor,
    check_dtypes_and_memory_formats,
    check_nan,
    check_ranks_that_disagree,
    check_whole_masks,
    check_memory,
)
