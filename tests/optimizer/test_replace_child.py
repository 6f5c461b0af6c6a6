"""replace_child: another child network for an optimizer between two steps."""

import copy

import pytest
from helpers import assert_same_run, both_backends, same_bits, same_snapshot, snapshot, train
from models import Tiny, child_of, random_scores

from childtune_fast import ChildAdamW, ChildNetwork


def another_child(model):
    return ChildNetwork.lowest(model, random_scores(model), reserve_p=0.2)


@both_backends
def test_masked_parameters_begin_anew_and_others_go_on(backend):
    model = Tiny()
    optimizer = ChildAdamW(model.parameters(), child=child_of(model), backend=backend)
    train(optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    untouched = copy.deepcopy(optimizer.state[model.classifier.weight])
    child = another_child(model)
    optimizer.replace_child(child)
    assert all(map(same_bits, before, model.parameters()))
    assert same_bits(optimizer.state[model.classifier.weight]["exp_avg"], untouched["exp_avg"])

    twin = copy.deepcopy(model)  # a new optimizer, with what the old one knew of the parameters without a mask
    fresh = ChildAdamW(twin.parameters(), child=ChildNetwork.from_masks(twin, child.masks()), backend=backend)
    for param, same in zip(model.parameters(), twin.parameters(), strict=True):
        if param not in optimizer.child_masks:
            fresh.state[same].update(copy.deepcopy(optimizer.state[param]))
    for run in (optimizer, fresh):
        train(run, range(3, 6))
    assert_same_run(optimizer, fresh)
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        if name in child.packed:
            assert same_bits(param[~child.masks()[name]], old[~child.masks()[name]])


def test_a_checkpoint_after_it_holds_the_new_child_network():
    model = Tiny()
    optimizer = ChildAdamW(model.parameters(), child=child_of(model))
    optimizer.replace_child(another_child(model))
    train(optimizer, range(2))
    twin = copy.deepcopy(model)
    resumed = ChildAdamW(twin.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for run in (optimizer, resumed):
        train(run, range(2, 4))
    assert_same_run(optimizer, resumed)


def test_one_of_another_model_is_refused_and_changes_nothing():
    model = Tiny()
    optimizer = ChildAdamW(model.parameters(), child=child_of(model))
    train(optimizer, range(2))
    before, masks = snapshot(optimizer), dict(optimizer.child_masks)
    with pytest.raises(ValueError, match="must mask a parameter of the optimizer"):
        optimizer.replace_child(child_of(Tiny()))
    assert same_snapshot(snapshot(optimizer), before)
    assert optimizer.child_masks == masks


def test_something_else_is_refused():
    optimizer = ChildAdamW(Tiny().parameters())
    with pytest.raises(TypeError, match=r"replace_child: child must be a ChildNetwork \(got str\)"):
        optimizer.replace_child("child.safetensors")


def test_a_group_that_lacks_decay_is_named_by_the_step():
    model = Tiny()
    optimizer = ChildAdamW(model.parameters(), child=child_of(model))
    del optimizer.param_groups[0]["decay"]
    optimizer.replace_child(another_child(model))
    with pytest.raises(ValueError, match="'decay' is missing in a group"):
        train(optimizer, [0])
