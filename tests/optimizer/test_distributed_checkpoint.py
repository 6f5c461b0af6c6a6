"""torch.distributed.checkpoint on one process: a resumed run of D and of F equals one that was not interrupted."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import both_backends, same_bits
from prelude import assert_outside_kept, assert_same_weights, child_of, go, net, of_d, weights
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from childtune_fast import ChildAdamW, ChildNetwork

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*assuming the intent is to:UserWarning", "ignore:.*is deprecated:FutureWarning"
)

OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "flat, offloaded": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "not strict": {"strict": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def of_f(model, **options):
    return ChildAdamW(model.parameters(), **{"lr": 1e-2, "seed": 3, **options})


def save(folder, model, optimizer, options):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    whole = {"model": model_state, "optimizer": optimizer_state}
    if "full_state_dict" in options:
        torch.save(whole, folder / "whole.pt")
    else:
        dcp.save(whole, checkpoint_id=folder / "parts")


def load(folder, model, optimizer, options):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    whole = {"model": model_state, "optimizer": optimizer_state}
    if "full_state_dict" in options:
        whole = torch.load(folder / "whole.pt", weights_only=True)
    else:
        dcp.load(whole, checkpoint_id=folder / "parts")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=whole["model"],
        optim_state_dict=whole["optimizer"],
        options=StateDictOptions(**options),
    )


@both_backends
@every_option
@pytest.mark.parametrize("make", [of_d, of_f], ids=lambda f: f.__name__)
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, backend, options, make):
    model = net()
    optimizer = make(model, backend=backend, amsgrad=True)
    go(model, optimizer, range(3))
    save(tmp_path, model, optimizer, options)
    go(model, optimizer, range(3, 6))
    resumed = net(seed=5)
    fresh = make(resumed, backend=backend, amsgrad=True)
    load(tmp_path, resumed, fresh, options)
    at_resume = weights(resumed)
    go(resumed, fresh, range(3, 6))
    assert_same_weights(model, resumed)
    if make is of_d:
        assert_outside_kept(resumed, at_resume)


@every_option
def test_parameters_without_state_and_frozen_ones(tmp_path, options):
    """torch drops what is saved of a frozen parameter, its mask too."""
    model = net()
    optimizer = of_d(model)
    model[0].weight.requires_grad_(False)
    go(model, optimizer, range(2))
    save(tmp_path, model, optimizer, options)
    resumed = net(seed=5)
    fresh = of_d(resumed)
    resumed[0].weight.requires_grad_(False)
    load(tmp_path, resumed, fresh, options)
    at_resume = weights(resumed)
    for each, run in ((model, optimizer), (resumed, fresh)):
        each[0].weight.requires_grad_(True)
        go(each, run, range(2, 4))
    assert_same_weights(model, resumed)
    assert_outside_kept(resumed, at_resume)


@every_option
def test_an_optimizer_without_child_network_takes_it_or_says_that_it_cannot(tmp_path, options):
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(3))
    save(tmp_path, model, optimizer, options)
    resumed = net(seed=5)
    before = weights(resumed)
    fresh = ChildAdamW(resumed.parameters(), lr=1e-2)
    if "full_state_dict" not in options:
        with pytest.raises(CheckpointException, match="Size mismatch between saved"):
            load(tmp_path, resumed, fresh, options)
        assert all(same_bits(p, before[name]) for name, p in resumed.named_parameters())
        return
    load(tmp_path, resumed, fresh, options)
    for each, run in ((model, optimizer), (resumed, fresh)):
        go(each, run, range(3, 5))
    assert_same_weights(model, resumed)


@pytest.mark.parametrize("shapes_agree", [False, True])
def test_another_child_network_is_refused(tmp_path, shapes_agree):
    """Where each tensor has as many weights in both, torch reads all of it before anybody can refuse."""
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(3))
    save(tmp_path, model, optimizer, {})
    other = net()
    masks = child_of(other).masks()
    if shapes_agree:
        masks = {name: mask.flatten().roll(1).view(mask.shape) for name, mask in masks.items()}
    else:
        masks = {name: ~mask for name, mask in masks.items()}
    fresh = of_d(other, child=ChildNetwork.from_masks(other, masks))
    if shapes_agree:
        with pytest.raises(ValueError, match="child network must be the checkpoint's"):
            load(tmp_path, other, fresh, {})
    else:
        with pytest.raises(CheckpointException, match="Size mismatch between saved"):
            load(tmp_path, other, fresh, {})
    assert all(torch.equal(mask.unpack(), masks[n]) for n, mask in zip(masks, fresh.child_masks.values(), strict=True))


def test_reading_writes_into_no_mask(tmp_path):
    model = net()
    optimizer = of_d(model)
    go(model, optimizer, range(1))
    before = {p: mask.bits.clone() for p, mask in optimizer.child_masks.items()}
    state = get_state_dict(model, optimizer)[1]["state"]
    for of_param in state.values():
        of_param.get("child_mask", torch.zeros(1)).fill_(0)
    assert all(torch.equal(mask.bits, before[p]) for p, mask in optimizer.child_masks.items())


def test_a_state_that_torch_has_begun_is_that_of_no_step_for_the_weights():
    """torch fills the state of a fresh optimizer by a step with empty gradients and a learning rate of 0."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = of_d(model, weight_decay=0.5)
    get_state_dict(model, optimizer)
    assert len(optimizer.state) == 4
    assert all(same_bits(model.state_dict()[key], value) for key, value in before.items())
