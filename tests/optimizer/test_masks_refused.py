"""Where a masked parameter is gone and an unknown one may be it, D raises and writes nothing."""

import copy
import itertools

import pytest
import torch
from helpers import both_backends, same_bits
from prelude import (
    MADE,
    adopted,
    child_of,
    go,
    net,
)
from torch import nn

from childtune_fast import ChildAdamW

GONE = "must be found in the model or in the optimizer's groups"


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
    for params in (model.parameters(), model.named_parameters()):
        with pytest.raises(ValueError, match=r"must keep its shape \(16, 8\) \(got \(16, 4\)\)"):
            ChildAdamW(params, child=child)


def test_a_group_that_is_refused_is_not_added():
    model = net()
    child = child_of(model)
    optimizer = ChildAdamW(model[2].parameters(), child=child)
    before = copy.deepcopy(optimizer.state_dict())
    del model[0]
    with pytest.raises(ValueError, match=GONE):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert str(optimizer.state_dict()) == str(before)
