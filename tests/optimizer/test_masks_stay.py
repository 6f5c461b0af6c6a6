"""Masks outlast whatever is done to state, groups and checkpoints between two steps."""

import copy

import pytest
import torch
from helpers import both_backends
from prelude import (
    MADE,
    assert_outside_kept,
    assert_same_weights,
    assign_groups,
    child_of,
    go,
    net,
    of_d,
    weights,
)
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork


def resumed_alike(model, optimizer):
    """Asserts that a checkpoint of the optimizer loads, with and without child=, and that both go on as it does."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    twins = [copy.deepcopy(model) for _ in range(2)]
    runs = [
        of_d(twins[0], backend=optimizer.backend),
        ChildAdamW(twins[1].parameters(), lr=1.0, backend=optimizer.backend),
    ]
    for run in runs:
        run.load_state_dict(copy.deepcopy(state_dict))
    before = weights(model)
    for each, run in zip((model, *twins), (optimizer, *runs), strict=True):
        go(each, run, range(10, 13))
        assert_outside_kept(each, before)
    for twin in twins:
        assert_same_weights(model, twin)


# ---- What is done to state and groups ------------------------------------------------------------------------------


def clear_state(model, optimizer):
    optimizer.state.clear()


def drop_one_state(model, optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"][0], None)


def empty_a_state(model, optimizer):
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {}


def empty_and_refill(model, optimizer):
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = []
    assert optimizer.state_dict()["state"] == {}
    optimizer.param_groups[0]["params"] = params


def replace_all(model, optimizer):
    """Other objects of the same values, in the model and at the same places of the group."""
    params = optimizer.param_groups[0]["params"]
    for i, layer, key in ((0, 0, "weight"), (1, 0, "bias"), (2, 2, "weight"), (3, 2, "bias")):
        params[i] = nn.Parameter(params[i].detach().clone())
        setattr(model[layer], key, params[i])


def replace_one(model, optimizer):
    optimizer.param_groups[0]["params"][2] = model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def reverse(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def save_and_load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


ACTIONS = [
    clear_state,
    drop_one_state,
    empty_a_state,
    empty_and_refill,
    replace_all,
    replace_one,
    assign_groups,
    save_and_load,
]
every_action = pytest.mark.parametrize("action", [*ACTIONS, reverse], ids=lambda f: f.__name__)


@both_backends
@pytest.mark.parametrize("made", MADE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [0, 2])
@every_action
def test_masks_outlast_what_is_done_to_state_and_groups(backend, made, steps, action):
    model, optimizer = made(backend)
    go(model, optimizer, range(steps))
    before = weights(model)
    action(model, optimizer)
    go(model, optimizer, range(steps, steps + 2))
    assert_outside_kept(model, before)
    if action is not reverse:  # whose checkpoints are of another order than a new optimizer's
        resumed_alike(model, optimizer)


@every_action
def test_a_checkpoint_right_after_it_holds_all_masks(action):
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(2))
    action(model, optimizer)
    saved = optimizer.state_dict()
    held = sorted(i for i, state in saved["state"].items() if "child_mask" in state)
    assert held == [i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p.ndim == 2]
    assert {group["child_fingerprint"] for group in saved["param_groups"]} == {child_of(net()).fingerprint}
    if action is not reverse:
        resumed_alike(model, optimizer)


@both_backends
def test_empty_moments_are_those_of_a_new_run(backend):
    model = net()
    optimizer = of_d(model, backend=backend)
    go(model, optimizer, range(3))
    optimizer.state.clear()
    state_dict, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    fresh = of_d(twin, backend=backend)
    go(twin, fresh, range(3, 5))
    loaded = of_d(model, backend=backend)
    loaded.load_state_dict(state_dict)
    go(model, loaded, range(3, 5))
    assert_same_weights(model, twin)


def test_a_checkpoint_without_any_state_loads_into_the_child_network_that_it_is_of():
    groups = of_d(net()).state_dict()["param_groups"]
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(2))
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    assert len(optimizer.state) == 0
    resumed_alike(model, optimizer)
    another = net()
    other = of_d(another, child=ChildNetwork.random(another, reserve_p=0.5, seed=1, maskable="weight"))
    for cannot in (ChildAdamW(net().parameters()), other):
        with pytest.raises(ValueError, match="only a part of it was passed"):
            cannot.load_state_dict({"state": {}, "param_groups": groups})


def test_masks_of_parameters_in_no_group_are_not_saved():
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(2))
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    saved = optimizer.state_dict()
    assert [i for i, state in saved["state"].items() if "child_mask" in state] == [0]
    loaded = ChildAdamW(net()[2].parameters())
    loaded.load_state_dict(saved)
    assert len(loaded.child_masks) == 1


def test_a_state_dict_is_a_snapshot_of_masks_and_of_a_run_that_has_not_begun():
    model = net()
    optimizer = of_d(model)
    init, before = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    assert len(optimizer.state) == 0
    go(model, optimizer, range(5))
    for state in optimizer.state_dict()["state"].values():
        state.get("child_mask", torch.zeros(1)).zero_()  # a copy
    optimizer.load_state_dict(init)
    model.load_state_dict(before)
    assert len(optimizer.state) == 0
    twin = net()
    fresh = of_d(twin)
    go(model, optimizer, range(3))
    go(twin, fresh, range(3))
    assert_same_weights(model, twin)


def test_the_fingerprint_is_a_live_key_of_every_group():
    model = net()
    f = ChildAdamW(model.parameters())
    assert f.param_groups[0]["child_fingerprint"] is None
    optimizer = ChildAdamW(model[2].parameters(), child=child_of(model))
    of_one = optimizer.param_groups[0]["child_fingerprint"]
    optimizer.add_param_group({"params": list(model[0].parameters())})
    both = {group["child_fingerprint"] for group in optimizer.param_groups}
    assert both == {child_of(model).fingerprint}
    assert of_one not in both
    f.load_state_dict(of_d(net()).state_dict())
    assert {f.param_groups[0]["child_fingerprint"]} == both
    plain = torch.optim.AdamW(net().parameters())
    of_f = ChildAdamW(net().parameters())
    of_f.load_state_dict(plain.state_dict())
    assert of_f.param_groups[0]["child_fingerprint"] is None


def test_masks_are_hashed_once(monkeypatch):
    hashed = []
    unpatched = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda t, **k: (hashed.append(t), unpatched(t, **k))[1])
    model = net()
    optimizer = of_d(model)
    made = len(hashed)
    for _ in range(3):
        optimizer.state_dict()
        go(model, optimizer, range(1))
    assert len(hashed) == made > 0


def test_0_1_0_checkpoints_load():
    """Release 0.1.0 gave a masked parameter its mask and a step count before its first step, and shared both."""
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(2))
    optimizer.state.pop(model[2].weight)
    old = optimizer.state_dict()
    assert set(old["state"][2]) == {"child_mask", "step"}
    for group in old["param_groups"]:
        group.update(reserve_p=1.0, decay="auto")
    for made in (of_d, lambda model: ChildAdamW(model.parameters())):
        twin = copy.deepcopy(model)
        loaded = made(twin)
        loaded.load_state_dict(copy.deepcopy(old))
        assert twin[2].weight not in loaded.state
        before = weights(twin)
        go(twin, loaded, range(2, 4))
        assert_outside_kept(twin, before)
    for state in old["state"].values():  # cleared before it was saved: 0.1.0 lost the masks and kept the fingerprint
        state.clear()
    of_d(copy.deepcopy(model)).load_state_dict(old)


def test_state_of_parameters_in_no_group_is_kept_and_not_saved():
    """torch's AdamW raises a KeyError of a number."""
    model = net()
    for optimizer in (ChildAdamW(model.parameters()), of_d(model)):
        go(model, optimizer, range(1))
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = params[:2]
        assert set(optimizer.state_dict()["state"]) == {0, 1}
        assert len(optimizer.state) == 4
        optimizer.param_groups[0]["params"] = params
        assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}


def test_a_checkpoint_of_another_epoch_is_adopted_by_an_optimizer_without_a_child_network_of_its_own():
    first, second = (ChildNetwork.random(net(), reserve_p=0.3, seed=s, maskable="weight").masks() for s in (0, 1))
    model = net()
    optimizer = ChildAdamW(model.parameters())
    for masks in (first, second):
        one = net()
        saved = ChildAdamW(one.parameters(), child=ChildNetwork.from_masks(one, masks))
        go(one, saved, range(1))
        optimizer.load_state_dict(saved.state_dict())
        adopted_masks = [mask.unpack() for mask in optimizer.child_masks.values()]
        assert all(map(torch.equal, adopted_masks, masks.values()))
