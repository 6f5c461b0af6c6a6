"""Checkpoints that change their number of ranks: a run that goes on from one equals a run that was not stopped.

The ranks of 4 save first, then those of 2 and 1 load and save, and so on, in the order in which test_ranks.py spawns.
"""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from check_steps import assert_same_weights, optimizer_of
from cut_models import EVEN, WAYS, child_of, equal_parts, given, go, like, tiny
from helpers import same_bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.ops.shards import whole_tensor

OPTIONS = {
    "F": {"seed": 3, "amsgrad": True},
    "D": {"child": child_of, "amsgrad": True},
}
FORMS = {
    "plain": {},
    "offloaded": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}
FEW_FORMS = ("plain", "full")  # of all ways but FSDP2


def ways(world):
    return ("whole", "FSDP2", "HSDP", "FSDP2 and TP") if world == 4 else ("whole", "FSDP2")


def made(mode, way, world, child=True):
    cut, sizes = WAYS[way]
    model = tiny(**{**EVEN, **sizes})
    options = dict(OPTIONS[mode])
    of_child = options.pop("child")(model) if "child" in options else None
    cut(model, world)
    if child and of_child is not None:
        options["child"] = of_child
    return model, optimizer_of(model, options, of_child)


@functools.cache
def expected(mode):
    """The state after three steps of a run that is not stopped, and the weights after five."""
    model, optimizer = made(mode, "whole", 1)
    go(model, optimizer, range(3))
    state = {i: {k: v.clone() for k, v in of.items()} for i, of in optimizer.dense_state_dict()["state"].items()}
    at_save = [p.detach().clone() for p in model.parameters()]
    go(model, optimizer, range(3, 5))
    return state, at_save, [p.detach() for p in model.parameters()]


def save(path, model, optimizer, form):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=StateDictOptions(**form))
    whole = {"model": model_state, "optimizer": optimizer_state}
    if "full_state_dict" not in form:
        dcp.save(whole, checkpoint_id=path)
    elif dist.get_rank() == 0:
        torch.save(whole, f"{path}.pt")
    dist.barrier()


def load(path, model, optimizer, form):
    options = StateDictOptions(**form)
    if "full_state_dict" not in form:
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        whole = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(whole, checkpoint_id=path)
    elif form.get("broadcast_from_rank0") and dist.get_rank() > 0:
        whole = {"model": {}, "optimizer": {}}
    else:
        whole = torch.load(f"{path}.pt", weights_only=True)
    set_model_state_dict(model, whole["model"], options=options)  # set_state_dict takes {} for "not the model"
    set_optimizer_state_dict(model, optimizer, whole["optimizer"], options=options)


def checkpoints_are_saved(rank, world, folder):
    for mode in OPTIONS:
        for way in ways(world):
            model, optimizer = made(mode, way, world)
            go(model, optimizer, range(3))
            optimizer.zero_grad()
            for form in FORMS if way == "FSDP2" else FEW_FORMS:
                save(folder / f"{mode}; {way}; {form}; {world}", model, optimizer, FORMS[form])


def checkpoints_are_loaded(rank, world, folder):
    """Those of all numbers of ranks that have been saved by now."""
    for path in sorted(folder.glob("*; *; *")):
        mode, of_way, form, _ = path.name.removesuffix(".pt").split("; ")
        for way in ways(world):
            if fits(mode, of_way, way, form):
                model, optimizer = made(mode, way, world)
                load(path.with_suffix(""), model, optimizer, FORMS[form])
                assert_goes_on(mode, model, optimizer, path.name, way)


def fits(mode, saved, way, form):
    """Whether it is one to try, and torch can load it.

    torch reads and broadcasts into what the optimizer has: dense DTensors, or compact values of whole parameters. A
    full state it cuts as the optimizer's is cut, which fails for compact values where parameters are cut by column.
    """
    if way in ("HSDP", "FSDP2 and TP") and saved not in ("whole", way):
        return False
    if mode == "F" or (saved == "whole") == (way == "whole"):
        return True
    return form.startswith("full") and way != "FSDP2 and TP"


def whole_checkpoints_are_loaded_into_parts(rank, world, folder):
    """By `load_state_dict` itself, on every rank, which knows where in the whole the compact values are."""
    for mode in OPTIONS:
        whole, optimizer_of_whole = made(mode, "whole", 1)
        go(whole, optimizer_of_whole, range(3))
        for way in (*ways(world), "FSDP2, columns"):
            for of_child in (True, False) if mode == "D" else (True,):
                model, optimizer = made(mode, way, world, of_child)
                with torch.no_grad():
                    for param, values in zip(model.parameters(), expected(mode)[1], strict=True):
                        param.copy_(like(values, param))
                optimizer.load_state_dict(optimizer_of_whole.state_dict())
                assert_goes_on(mode, model, optimizer, way, of_child)


def what_a_state_dict_holds_of_a_part_is_of_one_moment(rank, world, folder):
    """Its dense averages are copies; a step count that went on beside them would fit other ones."""
    model, optimizer = made("D", "FSDP2", world)
    go(model, optimizer, range(1))
    held = optimizer.state_dict()
    go(model, optimizer, range(1, 2))
    masked = [state for state in held["state"].values() if "child_mask" in state and "exp_avg" in state]
    assert masked
    assert all(state["step"] == 1 for state in masked)


def another_child_network_is_refused_with_what_helps(rank, world, folder):
    """torch.distributed.checkpoint reads no masks into an optimizer without a child network, so that one is no help."""
    path = folder / f"refused on {world}"
    model, optimizer = made("D", "FSDP2", world)
    go(model, optimizer, range(3))
    save(path, model, optimizer, {})
    model, _ = made("D", "FSDP2", world)
    other = ChildNetwork.random(model, reserve_p=0.3, seed=2)
    with pytest.raises(ValueError, match=r"with the child network that was saved or, unless torch\.distributed\.ch"):
        load(path, model, ChildAdamW(model.named_parameters(), child=other), {})
    with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
        load(path, model, ChildAdamW(model.named_parameters()), {})
    model, optimizer = made("D", "FSDP2", world)
    load(path, model, optimizer, {})
    assert_goes_on("D", model, optimizer)


def values_are_gathered_on_the_device_of_the_mesh(rank, world, folder):
    """Here that says it is a GPU: NCCL alone sends nothing from the CPU, where a checkpoint's values may lie."""
    whole = given((8, 3), 1)
    part = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])
    kind = mock.PropertyMock(return_value="cuda")
    moved_to = []

    def to(tensor, device):
        moved_to.append(device)
        kind.return_value = "cpu"
        return tensor

    with mock.patch.object(DeviceMesh, "device_type", kind, create=True), mock.patch.object(DTensor, "to", to):
        assert same_bits(whole_tensor(part), whole)
        assert moved_to == ["cuda"]
        assert same_bits(whole_tensor(part), whole)
        assert len(moved_to) == 1


def assert_goes_on(mode, model, optimizer, *what):
    at_save, _, weights = expected(mode)
    now = optimizer.dense_state_dict()["state"]
    for i, state in at_save.items():
        assert all(equal_parts(now[i][key], state[key]) for key in state), (*what, i)
    go(model, optimizer, range(3, 5))
    assert_same_weights(model, weights, *what)


CHECKS = (
    checkpoints_are_saved,
    checkpoints_are_loaded,
    whole_checkpoints_are_loaded_into_parts,
    what_a_state_dict_holds_of_a_part_is_of_one_moment,
    another_child_network_is_refused_with_what_helps,
    values_are_gathered_on_the_device_of_the_mesh,
)
