"""What the groups of an optimizer with a child network say: its decay, no reserve_p, and in words how many weights."""

import copy
import pickle

import pytest
import torch
from child_models import Model
from helpers import assert_same_run, make_params, train

from childtune_fast import ChildAdamW
from childtune_fast.optimizer import rows


def of_d(**options):
    model = Model()
    return model, ChildAdamW(model.parameters(), child=model.child(), **options)


def said(optimizer):
    return [(group.get("decay"), "reserve_p" in group) for group in optimizer.param_groups]


@pytest.mark.parametrize(("decay", "resolved"), [("auto", "child"), ("child", "child"), ("all", "all")])
def test_groups_say_the_decay_and_no_reserve_p(decay, resolved):
    _, optimizer = of_d(decay=decay)
    optimizer.add_param_group({"params": make_params([(3,)]), "reserve_p": 1.0})
    optimizer.add_param_group({"params": make_params([(3,)]), "decay": "auto"})
    assert said(optimizer) == [(resolved, False), (resolved, False), ("child", False)]
    assert "reserve_p" not in optimizer.defaults
    assert said(ChildAdamW(make_params(), decay="all" if decay == "child" else decay)) == [
        ("all" if decay == "child" else decay, True)
    ]


def test_repr_says_how_large_the_child_network_is():
    model, optimizer = of_d()
    kept, numel = sum(int(m.sum()) for m in model.masks.values()), sum(m.numel() for m in model.masks.values())
    text = repr(optimizer)
    assert text.endswith(f"\nchild: {kept:,} of {numel:,} weights\n)")
    assert "reserve_p" not in text
    assert "decay: child" in text
    f = repr(ChildAdamW(make_params()))
    assert "child:" not in f
    assert "reserve_p: 0.3" in f


def test_they_say_so_after_every_way_in():
    model, optimizer = of_d()
    train(optimizer, range(2))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert said(copied) == [("child", False)]
    adopted = ChildAdamW(copy.deepcopy(model).parameters(), reserve_p=0.5)
    adopted.load_state_dict(optimizer.state_dict())
    assert said(adopted) == [("child", False)]
    adopted.add_param_group({"params": make_params([(3,)])})
    assert said(adopted) == [("child", False)] * 2
    replaced = ChildAdamW(model.parameters(), reserve_p=0.5)
    replaced.replace_child(model.child())
    replaced.add_param_group({"params": make_params([(3,)])})
    assert said(replaced) == [("child", False)] * 2


def test_a_checkpoint_whose_groups_say_it_in_the_words_of_0_1_0_resumes():
    model, optimizer = of_d(weight_decay=0.5)
    train(optimizer, range(2))
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        group.update(reserve_p=1.0, decay="auto")
    twin = copy.deepcopy(model)
    resumed = ChildAdamW(twin.parameters())
    resumed.load_state_dict(old)
    assert said(resumed) == [("child", False)]
    for run in (optimizer, resumed):
        train(run, range(2, 4))
    assert_same_run(optimizer, resumed)


def test_a_dense_checkpoint_of_it_leaves_the_decay_and_reserve_p_to_the_one_that_loads_it():
    model, optimizer = of_d()
    train(optimizer, range(2))
    of_f = ChildAdamW(copy.deepcopy(model).parameters(), reserve_p=0.5)
    of_f.load_state_dict(optimizer.dense_state_dict())
    assert said(of_f) == [("auto", True)]
    assert of_f.param_groups[0]["reserve_p"] == 0.5
    of_other = ChildAdamW(model.parameters(), child=model.child())
    of_other.load_state_dict(of_f.state_dict())
    assert said(of_other) == [("child", False)]


@pytest.mark.parametrize("missing", ["lr", "seed", "reserve_p", "norm_of"])
def test_a_group_that_lacks_an_option_is_named(missing):
    optimizer = ChildAdamW(make_params())
    train(optimizer, [0])
    del optimizer.param_groups[0][missing]
    with pytest.raises(ValueError, match=f"'{missing}' is missing in a group"):
        train(optimizer, [1])


def test_a_key_error_of_anything_else_is_not_taken_for_a_damaged_checkpoint(monkeypatch):
    def broken(*arguments):
        raise KeyError("a fault elsewhere")

    monkeypatch.setattr(rows, "begin", broken)
    optimizer = ChildAdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(KeyError, match="a fault elsewhere"):
        train(optimizer, [0])
    assert len(optimizer.state) == 0
