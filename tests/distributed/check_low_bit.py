"""State in fewer bits, and stochastic rounding, on parameters that are cut: the bits of one rank, and refusals."""

import functools
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from check_steps import assert_same_weights, optimizer_of
from cut_models import WAYS, child_of, equal_parts, fsdp2, given, go, like, local, tiny
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from childtune_fast import ChildAdamW

SIZES = {"width": 128, "inner": 256, "layers": 1, "words": 67}  # rows are multiples of 128; 67 does not divide
KINDS = ("bfloat16", "8bit")
OPTIONS = {
    "p = 1": {"reserve_p": 1.0},
    "F": {"seed": 3, "amsgrad": True},
    "D": {"child": child_of, "amsgrad": True, "max_grad_norm": 1.0},
}


def made(mode, state, way, world, **more):
    model = tiny(**SIZES)
    child = child_of(model) if mode == "D" else None
    cut = fsdp2 if way == "FSDP2" else WAYS[way][0]
    return optimizer_of(cut(model, world), OPTIONS[mode], child, state=state, **more), model


@functools.cache
def expected(mode, state, backend="native", steps=3):
    optimizer, model = made(mode, state, "whole", 1, backend=backend)
    go(model, optimizer, range(steps))
    return [p.detach() for p in model.parameters()], optimizer.dense_state_dict()["state"]


def assert_same_state(optimizer, states, *what):
    ours = optimizer.dense_state_dict()["state"]
    assert ours.keys() == states.keys()
    for i, state in states.items():
        assert ours[i].keys() == state.keys()
        assert all(equal_parts(ours[i][key], state[key]) for key in state if key != "step"), (*what, i)
        assert float(ours[i]["step"]) == float(state["step"])


def trajectories_are_those_of_one_rank(rank, world, folder):
    cases = [("FSDP2", mode, state, "native") for mode in OPTIONS for state in KINDS]
    cases.append(("HSDP", "F", "8bit", "native"))
    if world == 2:  # in torch, steps take longer, and differ only in who computes them
        cases += [("FSDP2", "D", "8bit", "torch"), ("FSDP2", "F", "bfloat16", "torch")]
    for way, mode, state, backend in cases:
        optimizer, model = made(mode, state, way, world, backend=backend)
        go(model, optimizer, range(3))
        weights, states = expected(mode, state, backend)
        assert_same_weights(model, weights, way, mode, state, backend)
        assert_same_state(optimizer, states, way, mode, state, backend)


def states_are_placed_as_their_parameters(rank, world, folder):
    for mode in ("F", "D"):
        optimizer, model = made(mode, "8bit", "FSDP2", world)
        go(model, optimizer, range(2))
        saved = optimizer.state_dict()["state"]
        coded = 0
        for i, param in enumerate(model.parameters()):
            if "exp_avg_codes" not in saved[i]:
                assert param.numel() < 4096
                continue
            codes, scales = saved[i]["exp_avg_codes"], saved[i]["exp_avg_scales"]
            assert codes.placements == scales.placements == param.placements
            assert codes.shape == param.shape
            assert scales.shape == (param.shape[0], param.numel() // param.shape[0] // 128)
            assert scales.to_local().shape[0] == codes.to_local().shape[0]
            coded += 1
        assert coded == 4


def stochastic_rounding_is_that_of_one_rank(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    for shape, placement in (((9, 128), Shard(0)), ((1024,), Shard(0)), ((7, 5), Replicate())):
        for backend in ("native", "torch"):
            start = given(shape, 1, torch.bfloat16)
            param = torch.nn.Parameter(distribute_tensor(start, mesh, [placement]))
            alone = torch.nn.Parameter(start.clone())
            for p in (param, alone):
                optimizer = ChildAdamW([p], lr=1e-3, seed=3, rounding="stochastic", backend=backend)
                for step in range(3):
                    p.grad = like(given(shape, 10 + step, torch.bfloat16), p)
                    optimizer.step()
            assert equal_parts(param, alone), (shape, backend)


def wrong_places_are_refused_on_all_ranks(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    # (shape, cut dimension, dtype, options, what the error asks for; None if only several ranks are refused)
    cases = (
        ((128, 256), 1, torch.float32, {"state": "8bit"}, "no other dimension than the first may be cut"),
        ((128, 256), 1, torch.float32, {"state": "bfloat16"}, "no other dimension than the first may be cut"),
        ((100, 100), 0, torch.float32, {"state": "8bit"}, "a row must be a multiple of 128 elements"),
        ((100, 100), 0, torch.float32, {"state": "bfloat16"}, "what each rank holds must be a multiple of 128"),
        ((4096 + 128,), 0, torch.float32, {"state": "8bit"}, "a row must be a multiple of 128 elements"),
        ((129,), 0, torch.bfloat16, {"rounding": "stochastic"}, "what each rank holds must be a multiple of 128"),
    )
    for shape, dim, dtype, options, message in cases:
        param = torch.nn.Parameter(distribute_tensor(given(shape, 1, dtype), mesh, [Shard(dim)]))
        if world == 1 and "a row" not in message:
            ChildAdamW([param], **options)
            continue
        with pytest.raises(ValueError, match=message + ".*give it a group with state='float32' and rounding='nearest'"):
            ChildAdamW([param], **options)
        optimizer = ChildAdamW([param], seed=3)
        optimizer.param_groups[0].update(options)
        param.grad = like(given(shape, 2, dtype), param)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not optimizer.state
        optimizer.param_groups[0].update(state="float32", rounding="nearest")
        optimizer.step()
        if "rounding" in options:
            saved = optimizer.state_dict()
            saved["param_groups"][0]["rounding"] = "stochastic"
            with pytest.raises(ValueError, match=message):
                ChildAdamW([param]).load_state_dict(saved)
    if world > 1:
        model = tiny(**SIZES)
        with pytest.raises(ValueError, match=re.escape("for state='8bit' of a DTensor, no other dimension than the")):
            ChildAdamW(WAYS["FSDP2 and TP"][0](model, world).parameters(), state="8bit")


def whole_checkpoints_and_those_of_parts_are_converted(rank, world, folder):
    """Of whole parameters into parts and back, it is the same conversion. F's is part of D's, so fewer ranks do it."""
    for mode in ("F", "D") if world == 2 else ("D",):
        for saved in ("float32", "8bit"):
            of_whole, whole = made(mode, saved, "whole", 1)
            go(whole, of_whole, range(3))
            of_parts, parts = made(mode, saved, "FSDP2", world)
            go(parts, of_parts, range(3))
            for loaded in ("float32", "8bit"):
                found = []
                for source in (of_whole, of_parts):
                    for way in ("whole", "FSDP2"):
                        optimizer, _ = made(mode, loaded, way, world)
                        optimizer.load_state_dict(source.state_dict())
                        found.append(optimizer.dense_state_dict()["state"])
                for state, other in zip(found[0].values(), found[1].values(), strict=True):
                    for key in state:
                        assert state[key].dtype == other[key].dtype
                for other in found[1:]:
                    for i, state in found[0].items():
                        assert all(equal_parts(other[i][key], state[key]) for key in state if key != "step"), (
                            *(mode, saved, loaded, i),
                        )


def checkpoints_are_saved(rank, world, folder):
    for mode in ("F", "D"):
        for way in ("whole", "FSDP2"):
            optimizer, model = made(mode, "8bit", way, world)
            go(model, optimizer, range(3))
            optimizer.zero_grad()
            model_state, optimizer_state = get_state_dict(model, optimizer)
            path = folder / f"8bit, {mode}, {way}, {world}"
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def checkpoints_are_loaded(rank, world, folder):
    """Those of all numbers of ranks that have been saved by now, as in check_checkpoints.py."""
    paths = sorted(folder.glob("8bit, *"))
    assert paths
    for path in paths:
        _, mode, saved, _ = path.name.split(", ")
        # torch reads into what is there: scales of a DTensor are in rows, and D's state of whole parameters is compact.
        optimizer, model = made(mode, "8bit", saved, world)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        assert_same_state(optimizer, expected(mode, "8bit")[1], path.name)
        go(model, optimizer, range(3, 5))
        assert_same_weights(model, expected(mode, "8bit", steps=5)[0], path.name)
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (saved == "FSDP2")
        assert all(local(p).isfinite().all() for p in model.parameters())


CHECKS = (
    trajectories_are_those_of_one_rank,
    states_are_placed_as_their_parameters,
    stochastic_rounding_is_that_of_one_rank,
    wrong_places_are_refused_on_all_ranks,
    whole_checkpoints_and_those_of_parts_are_converted,
    checkpoints_are_saved,
    checkpoints_are_loaded,
)
