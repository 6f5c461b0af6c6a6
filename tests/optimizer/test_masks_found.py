"""A masked parameter is masked whichever way it comes into a group, and whatever becomes of its model before."""

import copy
import pickle

import pytest
import torch
from helpers import both_backends, same_bits
from prelude import (
    assert_outside_kept,
    assign_groups,
    child_of,
    go,
    masks_of_net,
    net,
    of_d,
    weights,
)
from torch import nn
from torch.nn.utils import prune

from childtune_fast import ChildAdamW, ChildNetwork

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile's own


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
    assert child.places.names()[model[0].weight] == "0.weight"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrappers_are_seen_through_both_ways(wrap, copied):
    model = net()
    for inside, outside in ((model, wrap(model)), (wrap(model), model)):
        child = copy.deepcopy(child_of(inside)) if copied else child_of(inside)
        optimizer = ChildAdamW(outside.named_parameters(), child=child)
        found = [mask.unpack() for mask in optimizer.child_masks.values()]
        assert all(map(torch.equal, found, masks_of_net().values()))


def test_a_model_that_gets_its_memory_after_the_choice(tmp_path):
    child_of(net()).save(tmp_path / "child")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    child = ChildNetwork.load(tmp_path / "child", model)
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    before = weights(model)
    optimizer = ChildAdamW(model.parameters(), child=child)
    go(model, optimizer, range(2))
    assert_outside_kept(model, before)


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
