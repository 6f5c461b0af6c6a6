"""Where a masked parameter is in its model: after layers were replaced, tied and untied, in copies, behind wrappers."""

import copy
import pickle

import pytest
import torch
from helpers import both_backends, same_bits
from prelude import assert_outside_kept, child_of, go, masks_of_net, net, of_d, weights
from torch import nn
from torch.nn.utils import prune

from childtune_fast import ChildAdamW, ChildNetwork

GONE = "must be found in the model or in the optimizer's groups"


@pytest.mark.parametrize("assigned", [False, True])
def test_more_parameters_than_names_in_a_group(assigned):
    model = net()
    optimizer = ChildAdamW(list(model[2].named_parameters()), child=child_of(model))
    if assigned:
        optimizer.param_groups[0]["params"] = list(model.parameters())
    else:
        optimizer.param_groups[0]["params"] += list(model[0].parameters())
    before = weights(model)
    go(model, optimizer, range(2))
    assert_outside_kept(model, before)


@both_backends
@pytest.mark.parametrize("made_before", [False, True])
def test_a_layer_that_is_replaced_while_the_old_one_lives_on(backend, made_before):
    model = net()
    child, old = child_of(model), model[0]
    optimizer = ChildAdamW(model.parameters(), child=child, backend=backend)
    model[0] = nn.Linear(8, 16)
    model[0].load_state_dict(old.state_dict())
    if made_before:
        optimizer.param_groups[0]["params"][:2] = list(model[0].parameters())
    else:
        optimizer = ChildAdamW(model.parameters(), child=child, backend=backend)
    before = weights(model)
    go(model, optimizer, range(2))
    assert_outside_kept(model, before)


def test_a_layer_that_lives_on_outside_of_the_model_is_gone():
    model = net()
    child, old = child_of(model), model[0]
    model[0] = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(ValueError, match=rf"{GONE}.*'0\.weight'"):
        ChildAdamW(model.parameters(), child=child)
    assert old.weight.shape == (16, 8)


def test_names_are_not_trusted_where_layers_have_changed_places():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")
    model[0], model[1], model[2] = copy.deepcopy(model[1]), model[0], model[2]
    with pytest.raises(ValueError, match=rf"{GONE}.*'1\.weight'"):
        ChildAdamW(model.parameters(), child=child)


def test_what_is_missed_is_missed_in_a_copy():
    model = net()
    optimizer = ChildAdamW(model[2].parameters(), child=child_of(model))
    model[0] = nn.Sequential(nn.Linear(8, 16))
    for optimizer_, model_ in ((optimizer, model), copy.deepcopy((model, optimizer))[::-1]):
        with pytest.raises(ValueError, match=GONE):
            optimizer_.add_param_group({"params": list(model_[0].parameters())})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda child: pickle.loads(pickle.dumps(child))])
def test_a_copy_does_not_take_a_name_that_its_model_did_not_have_for_another_parameter(copied):
    model = net()
    child = copied(child_of(model))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"called '0\.weight_orig', which its model did not have"):
        ChildAdamW(model.named_parameters(), child=child)


def test_a_copy_forgets_where_objects_were():
    """Objects of a copy may have the addresses of others that are gone."""
    model = net()
    optimizer = of_d(model)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied._book._ids == []
        assert len(copied.child_masks) == 2


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.b.weight = self.a.weight


def kept(model, child, before):
    """Which of the two weights kept all bits outside of the mask that the child network has for `a`."""
    mask = child.masks()["a.weight"]
    now = [layer.weight[~mask] for layer in (model.a, model.b)]
    return [same_bits(n, b[~mask]) for n, b in zip(now, before, strict=True)]


def test_a_tie_that_is_undone_leaves_two_masked_parameters():
    model = Tied(tied=True)
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable=r"a\.weight")
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert model.a.weight is not model.b.weight
    before = [layer.weight.detach().clone() for layer in (model.a, model.b)]
    go(model, ChildAdamW(model.parameters(), child=child), range(2))
    assert kept(model, child, before) == [True, True]


@pytest.mark.parametrize("made_before", [False, True])
def test_a_parameter_that_is_tied_to_a_masked_ones_place_is_masked(made_before):
    model = Tied(tied=False)
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable=r"a\.weight")
    optimizer = ChildAdamW(model.parameters(), child=child)
    model.a.weight = model.b.weight
    if made_before:
        optimizer.param_groups[0]["params"] = list(model.parameters())
    else:
        optimizer = ChildAdamW(model.parameters(), child=child)
    before = [layer.weight.detach().clone() for layer in (model.a, model.b)]
    go(model, optimizer, range(2))
    assert kept(model, child, before) == [True, True]


def test_a_masked_parameter_keeps_its_own_mask_at_the_place_of_another():
    model = Tied(tied=False)
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")
    masks = child.masks()
    a, b = model.a.weight, model.b.weight
    model.a.weight, model.b.weight = b, a
    found = ChildAdamW(model.parameters(), child=child).child_masks
    assert torch.equal(found[a].unpack(), masks["a.weight"])
    assert torch.equal(found[b].unpack(), masks["b.weight"])


def test_a_checkpoint_with_the_masks_in_another_order_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    child = ChildNetwork.random(model, reserve_p=0.25, seed=0, scope="tensor", maskable="weight")
    params = [model[0].weight, model[1].weight]
    saved = ChildAdamW(params, child=child).state_dict()
    with pytest.raises(ValueError, match="child network must be the checkpoint's"):
        ChildAdamW(params[::-1], child=child).load_state_dict(saved)


def test_parameters_of_the_model_that_are_not_masked_may_have_an_optimizer_of_their_own():
    """As a rank of ZeroRedundancyOptimizer may, or a group that is filled later."""
    model = net()
    child = child_of(model)
    biases = ChildAdamW([model[0].bias, model[2].bias], child=child)
    before = weights(model)
    go(model, biases, range(1))
    assert (model[0].bias != before["0.bias"]).all()
    filled = ChildAdamW([{"params": []}], child=child)
    filled.param_groups[0]["params"] += list(model.parameters())
    go(model, filled, range(2))
    assert_outside_kept(model, before)


def test_another_child_network_helps_where_the_present_one_lost_a_parameter():
    model = net()
    optimizer = of_d(model)
    nn.utils.parametrizations.weight_norm(model[0])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(ValueError, match=GONE):
        optimizer.state_dict()
    optimizer.replace_child(ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight"))
    assert len(optimizer.child_masks) == 3


def test_a_load_that_a_hook_stops_changes_nothing():
    optimizer = ChildAdamW(net().parameters(), reserve_p=0.5)
    before, defaults = str(optimizer.state_dict()), dict(optimizer.defaults)

    def stop(_):
        raise RuntimeError("stopped")

    optimizer.register_load_state_dict_post_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        optimizer.load_state_dict(of_d(net()).state_dict())
    assert optimizer.child_masks == {}
    assert str(optimizer.state_dict()) == before
    assert optimizer.defaults == defaults


def test_values_of_the_users_own_in_the_state():
    for optimizer in (ChildAdamW(net().parameters()), of_d(net())):
        optimizer.state["epoch"] = 3
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["epoch"] == 3
        assert optimizer.dense_state_dict()["state"]["epoch"] == 3


class Wrapper(ChildAdamW):
    """As Lightning's and Fabric's: a class made of the optimizer's, which asks the optimizer for what it lacks."""

    def __init__(self, optimizer):
        self.__dict__["_optimizer"] = optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_a_wrapper_that_inherits_sees_the_same_masks():
    model = net()
    optimizer = of_d(model)
    wrapper = Wrapper(optimizer)
    assert len(wrapper.child_masks) == 2
    assert "child_mask" in wrapper.state_dict()["state"][0]
    go(model, optimizer, range(1))
    assert wrapper.dense_state_dict()["state"][0]["exp_avg"].shape == (16, 8)
    other = ChildNetwork.random(model, reserve_p=0.3, seed=1, maskable="weight")
    wrapper.replace_child(other)
    before = weights(model)
    go(model, optimizer, range(1, 3))
    assert_outside_kept(model, before, other.masks())
    assert not torch.equal(other.masks()["0.weight"], masks_of_net()["0.weight"])
