"""Checkpoints of an optimizer with a child network: resumed, adopted, refused, and exchanged with dense ones."""

import copy
import subprocess
import sys

import pytest
import torch
from child_models import Model, child_adamw, params_of
from helpers import assert_same_run, both_backends, same_bits, set_grads, train

from childtune_fast import ChildAdamW, ChildNetwork


def saved(optimizer, tmp_path):
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@both_backends
@pytest.mark.parametrize("rebuilt", ["with the child network", "without"])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, backend, rebuilt, steps_before):
    whole = child_adamw(Model(), backend=backend, amsgrad=True)
    train(whole, range(6))
    first = child_adamw(Model(), backend=backend, amsgrad=True)
    train(first, range(steps_before))
    model = Model(seed=5)  # other values, which the checkpoint replaces
    for p, q in zip(model.parameters(), params_of(first), strict=True):
        p.data = q.data.clone()
    child = {}
    if rebuilt == "with the child network":
        child = {"child": ChildNetwork.from_masks(model, Model().masks)}
    resumed = ChildAdamW(model.parameters(), lr=1e-2, backend=backend, amsgrad=True, **child)
    resumed.load_state_dict(saved(first, tmp_path))
    train(resumed, range(steps_before, 6))
    assert_same_run(whole, resumed)


def test_a_new_process_resumes(tmp_path):
    whole, first = child_adamw(Model()), child_adamw(Model())
    train(whole, range(4))
    train(first, range(2))
    torch.save([first.state_dict(), [p.detach() for p in params_of(first)]], tmp_path / "run.pt")
    code = f"""
import sys, torch; sys.path[:0] = ["tests/support", "."]
from helpers import train; from childtune_fast import ChildAdamW
state, params = torch.load(r"{tmp_path / "run.pt"}", weights_only=True)
params = [torch.nn.Parameter(p) for p in params]
opt = ChildAdamW(params, lr=1.0); opt.load_state_dict(state); train(opt, range(2, 4))
torch.save([p.detach() for p in params], r"{tmp_path / "end.pt"}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for p, q in zip(params_of(whole), torch.load(tmp_path / "end.pt"), strict=True):
        assert same_bits(p.detach(), q)


def test_the_checkpoint_holds_masks_and_fingerprint():
    model = Model()
    opt = child_adamw(model)
    state_dict = opt.state_dict()
    assert {group["child_fingerprint"] for group in state_dict["param_groups"]} == {model.child().fingerprint}
    assert sorted(state_dict["state"]) == list(range(len(model.masks)))
    assert ChildAdamW(Model().parameters()).state_dict()["param_groups"][0]["child_fingerprint"] is None


def test_another_child_network_is_refused():
    opt, other = child_adamw(Model()), child_adamw(Model(density=0.2))
    train(other, range(1))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="child network must be the checkpoint's"):
        opt.load_state_dict(other.state_dict())
    assert str(opt.state_dict()) == str(before)
    train(opt, range(1))


@pytest.mark.parametrize("damage", ["bit", "lost mask", "shape", "no tensor"])
def test_a_damaged_mask_is_refused(damage):
    opt = child_adamw(Model())
    train(opt, range(1))
    state_dict = copy.deepcopy(opt.state_dict())
    state = state_dict["state"][0]
    if damage == "bit":
        state["child_mask"][0] ^= 1
    elif damage == "lost mask":
        del state["child_mask"]
    elif damage == "shape":
        state["child_mask"] = state["child_mask"][:-1]
    else:
        state["child_mask"] = "mask"
    fresh = ChildAdamW(Model().parameters())
    with pytest.raises(ValueError, match=r"damaged|must be a contiguous uint8|must be a tensor"):
        fresh.load_state_dict(state_dict)
    assert not fresh.child_masks
    train(fresh, range(1))


def test_a_dense_checkpoint_is_gathered():
    model = Model()
    dense = torch.optim.AdamW(Model().parameters(), lr=1e-3, amsgrad=True)
    train(dense, range(3))
    opt = child_adamw(model, amsgrad=True)
    opt.load_state_dict(dense.state_dict())
    for p, q in zip(params_of(opt), params_of(dense), strict=True):
        mask = opt.child_masks.get(p)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            expected = dense.state[q][key]
            assert same_bits(opt.state[p][key], expected if mask is None else expected[mask.unpack()])
    train(opt, range(3, 4))


def test_a_checkpoint_of_the_random_child_network_leaves_no_mask_behind():
    """Loaded into a child network, F's reserve_p must not mask the parameters that train in full."""
    random = ChildAdamW(Model().parameters(), lr=1e-2, seed=1)
    train(random, range(2))
    opt = child_adamw(Model())
    opt.load_state_dict(random.state_dict())
    before = opt.state[params_of(opt)[-1]]["exp_avg"].clone()
    train(opt, range(2, 3))
    assert (opt.state[params_of(opt)[-1]]["exp_avg"] != 0.9 * before).all()  # a dropped gradient would leave just that


def test_dense_state_dict_goes_to_torch_and_back():
    opt = child_adamw(Model())
    train(opt, range(3))
    before = copy.deepcopy(opt.state_dict())
    dense = opt.dense_state_dict()
    assert str(opt.state_dict()) == str(before)
    peer = torch.optim.AdamW(Model().parameters())
    peer.load_state_dict(copy.deepcopy(dense))  # torch shares what it loads
    for p, q in zip(params_of(opt), params_of(peer), strict=True):
        if p in opt.child_masks:
            mask = opt.child_masks[p].unpack()
            assert (peer.state[q]["exp_avg"][~mask] == 0).all()
            assert same_bits(peer.state[q]["exp_avg"][mask], opt.state[p]["exp_avg"])
    train(peer, range(3, 4))
    again = child_adamw(Model())
    again.load_state_dict(dense)
    for p, q in zip(params_of(again), params_of(opt), strict=True):
        p.data = q.data.clone()
    train(again, range(3, 5))
    train(opt, range(3, 5))
    assert_same_run(again, opt)


def test_a_group_added_later_is_masked():
    model = Model()
    params = list(model.parameters())
    opt = ChildAdamW(params[:2], child=model.child())
    opt.add_param_group({"params": params[2:]})
    assert len(opt.child_masks) == len(model.masks)
    set_grads(params, 0)
    opt.step()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ({"step": torch.zeros(2)}, TypeError),
        ({"exp_avg": torch.zeros(3)}, ValueError),
        ({"exp_avg": 1.0}, TypeError),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(damage, error):
    opt = child_adamw(Model())
    train(opt, range(1))
    state_dict = copy.deepcopy(opt.state_dict())
    state_dict["state"][0].update(damage)
    fresh = ChildAdamW(Model().parameters())
    with pytest.raises(error, match=f"load_state_dict: state '{next(iter(damage))}'.* must"):
        fresh.load_state_dict(state_dict)
    assert not fresh.child_masks


def test_a_group_added_after_a_child_network_was_adopted_trains_in_full():
    model = Model()
    params = list(model.parameters())
    first = ChildAdamW(params[:2], child=model.child())
    adopted = ChildAdamW(params[:2])
    adopted.load_state_dict(first.state_dict())
    adopted.add_param_group({"params": params[2:]})
    train(adopted, range(1))
    assert (adopted.state[params[-1]]["exp_avg"] != 0).all()
