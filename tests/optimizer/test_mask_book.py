"""A masked parameter stays masked, whatever is done to state, groups and model between two steps, or it is refused."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import both_backends, same_bits
from prelude import assert_outside_kept, assert_same_weights, child_of, go, masks_of_net, net, of_d, weights
from torch import nn
from torch.nn.utils import prune

from childtune_fast import ChildAdamW, ChildNetwork

GONE = "must be found in the model or in the optimizer's groups"


def with_child(backend="auto"):
    model = net()
    return model, of_d(model, backend=backend)


def adopted(backend="auto"):
    """The child network is a checkpoint's."""
    model = net()
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, backend=backend)
    optimizer.load_state_dict(of_d(net()).state_dict())
    return model, optimizer


def unpickled(backend="auto"):
    return pickle.loads(pickle.dumps(with_child(backend)))


MADE = [with_child, adopted, unpickled]


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


def assign_groups(model, optimizer):
    """As Lightning's BaseFinetuning does when it resumes."""
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.param_groups = [{**options, "params": list(model.parameters())}]


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


# ---- How parameters come into groups -------------------------------------------------------------------------------


def extend_the_list(model, optimizer):
    optimizer.param_groups[0]["params"] += list(model[0].parameters())


def add_a_group(model, optimizer):
    optimizer.add_param_group({"params": list(model[0].parameters())})


def add_a_named_group(model, optimizer):
    optimizer.add_param_group({"params": [(f"0.{name}", p) for name, p in model[0].named_parameters()]})


def append_a_group(model, optimizer):
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.param_groups.append({**group, "params": list(model[0].parameters())})


WAYS_IN = [extend_the_list, add_a_group, append_a_group, assign_groups]
every_way_in = pytest.mark.parametrize("enter", WAYS_IN, ids=lambda f: f.__name__)


@both_backends
@every_way_in
@pytest.mark.parametrize("copied", [False, True])
def test_parameters_that_come_later_are_masked(backend, enter, copied):
    model = net()
    optimizer = ChildAdamW(model[2].parameters(), lr=1e-2, child=child_of(model), backend=backend)
    go(model, optimizer, range(1))
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    before = weights(model)
    enter(model, optimizer)
    go(model, optimizer, range(1, 3))
    assert_outside_kept(model, before)


def test_a_named_group_on_an_unnamed_copy():
    model = net()
    named = [(f"2.{name}", p) for name, p in model[2].named_parameters()]
    optimizer = pickle.loads(pickle.dumps(ChildAdamW(named, child=child_of(model))))
    add_a_named_group(model, optimizer)
    assert len(optimizer.child_masks) == 2
    unnamed = pickle.loads(pickle.dumps(ChildAdamW(model[2].parameters(), child=child_of(model))))
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\)"):
        unnamed.add_param_group({"params": list(model[0].parameters())})
    assert len(unnamed.param_groups) == 1


@pytest.mark.parametrize("named", [False, True])
def test_weights_that_are_assigned_after_the_choice_are_masked(named):
    model = net()
    child = child_of(model)
    model.load_state_dict(net(seed=1).state_dict(), assign=True)
    before = weights(model)
    optimizer = ChildAdamW(model.named_parameters() if named else model.parameters(), child=child)
    go(model, optimizer, range(2))
    assert_outside_kept(model, before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def pruned(module):
    prune.random_unstructured(module, "weight", 0.5)


@both_backends
@pytest.mark.parametrize("change", [doubled, pruned], ids=lambda f: f.__name__)
def test_a_parameter_that_its_module_calls_otherwise_is_masked(backend, change):
    model = net()
    child = child_of(model)
    weight, mask = model[0].weight, child.masks()["0.weight"]
    change(model[0])
    assert any(p is weight for p in model.parameters())
    before = weight.detach().clone()
    optimizer = ChildAdamW(model.parameters(), child=child, backend=backend)
    go(model, optimizer, range(2))
    assert same_bits(weight[~mask], before[~mask])
    assert (weight[mask] != before[mask]).all()


def test_a_module_that_only_holds_the_parameters_may_be_gone():
    params = list(net().parameters())
    child = ChildNetwork.random(nn.ParameterList(params), reserve_p=0.3, seed=0, maskable=r"^[02]")
    assert len(ChildAdamW(params, child=child).child_masks) == 2


def test_a_model_can_be_converted_by_swapping_its_tensors():
    """As torch converts tensors of other classes, which weak references to them would prevent."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = net()
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(TwoTensor(layer.weight.detach().clone(), layer.weight.detach().clone()))
    child = child_of(model)
    model.double()
    assert child.places.current()["0.weight"] is model[0].weight


def test_other_parameters_of_the_model_may_take_the_place_of_masked_ones():
    """As in gradual unfreezing: the model is known, and all masked parameters are where they were in it."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable=r"^[01]\.weight")
    optimizer = ChildAdamW(model[0].parameters(), child=child)
    go(model, optimizer, range(1))
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    before = weights(model)
    go(model, optimizer, range(1, 2))
    assert (model[2].weight != before["2.weight"]).all()
    optimizer.param_groups[0]["params"] = list(model[1].parameters())
    go(model, optimizer, range(2, 3))
    mask = child.masks()["1.weight"]
    assert same_bits(model[1].weight[~mask], before["1.weight"][~mask])


def test_master_copies_in_the_place_of_parameters_are_masked():
    """As mixed precision tools keep float32 weights beside those of the model, which stay where they are."""
    model = net().to(torch.bfloat16)
    optimizer = of_d(model)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = masters
    before = [p.detach().clone() for p in masters]
    for p in masters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, mask in zip((0, 2), masks_of_net().values(), strict=True):
        assert same_bits(masters[i][~mask], before[i][~mask])
        assert (masters[i][mask] != before[i][mask]).all()


def test_a_new_head_trains_in_full():
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(1))
    head = nn.Linear(2, 3)
    optimizer.add_param_group({"params": list(head.parameters())})
    optimizer.param_groups[0]["params"].append(extra := nn.Parameter(torch.zeros(5)))
    before = weights(head)
    whole = nn.ModuleList([model, head, nn.ParameterList([extra])])
    go(whole, optimizer, range(1, 3))
    assert (head.weight != before["weight"]).all()
    assert (extra != 0).all()
    assert len(optimizer.child_masks) == 2


def test_another_model_with_the_same_names_is_not_masked():
    student, teacher = net(), net(1)
    optimizer = ChildAdamW(student.named_parameters(), child=child_of(student))
    optimizer.add_param_group({"params": list(teacher.named_parameters())})
    assert set(optimizer.child_masks) == {student[0].weight, student[2].weight}


# ---- What is refused -----------------------------------------------------------------------------------------------


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module)


def weight_normed(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)


def frozen_bits(model, optimizer, act):
    """Asserts that `act` raises a ValueError of a masked parameter that is gone, and writes nothing."""
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(ValueError, match=GONE):
        act()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(itertools.starmap(same_bits, zip(before, after, strict=True)))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("change", [parametrized, weight_normed], ids=lambda f: f.__name__)
def test_a_masked_parameter_that_is_gone_from_the_model_is_missed(change, named):
    model = net()
    child = child_of(model)
    partial = ChildAdamW(model[2].parameters(), child=child)
    change(model[0])
    params = list(model.named_parameters() if named else model.parameters())
    with pytest.raises(ValueError, match=rf"{GONE}.*'0\.weight'"):
        ChildAdamW(params, child=child)
    later = [pair for pair in params if not named or pair[0].startswith("0.")]
    later = later if named else list(model[0].parameters())
    if not named:  # torch wants all groups named, or none
        with pytest.raises(ValueError, match=GONE):
            partial.add_param_group({"params": later})
        assert len(partial.param_groups) == 1
        partial.param_groups[0]["params"] += later
        frozen_bits(model, partial, lambda: go(model, partial, range(1)))
        frozen_bits(model, partial, partial.state_dict)


@both_backends
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("made", MADE, ids=lambda f: f.__name__)
def test_one_flat_parameter_in_the_place_of_all_is_refused(backend, steps, made):
    """As DeepSpeed's ZeRO puts it there."""
    model, optimizer = made(backend)
    go(model, optimizer, range(steps))
    flat = nn.Parameter(nn.utils.parameters_to_vector(model.parameters()).detach())
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    frozen_bits(model, optimizer, optimizer.step)
    frozen_bits(model, optimizer, optimizer.state_dict)


def test_parameters_in_another_order_than_those_whose_place_they_take_are_refused():
    model, optimizer = adopted()
    twin = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(reversed(list(twin.parameters())))
    frozen_bits(twin, optimizer, lambda: go(twin, optimizer, range(1)))


def test_other_shapes_are_refused():
    model = net()
    child = child_of(model)
    model[0] = nn.Linear(4, 16)
    with pytest.raises(ValueError, match=GONE):
        ChildAdamW(model.parameters(), child=child)
    with pytest.raises(ValueError, match=r"must keep its shape \(16, 8\) \(got \(16, 4\)\)"):
        ChildAdamW(model.named_parameters(), child=child)


def test_a_group_that_is_refused_is_not_added():
    model = net()
    child = child_of(model)
    optimizer = ChildAdamW(model[2].parameters(), child=child)
    before = copy.deepcopy(optimizer.state_dict())
    del model[0]
    with pytest.raises(ValueError, match=GONE):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert str(optimizer.state_dict()) == str(before)


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
