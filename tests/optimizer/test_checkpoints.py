"""Checkpoints: resuming bit for bit, exchange with torch.optim.AdamW, older and wrong state dicts."""

import copy

import pytest
import torch
from helpers import assert_same_run, both_backends, child_adamw, every_dtype, make_params, same_bits, set_grads, train
from processes import python, result_of

from childtune_fast import ChildAdamW

OPTIONS = {
    "F": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.3},
    "hf": {"variant": "hf"},
    "clipped": {"max_grad_norm": 0.5, "maximize": True},
}


def saved_and_loaded(optimizer, path):
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, path)
    return torch.load(path, weights_only=True)


@both_backends
@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resume_equals_no_interruption(options, dtype, backend, tmp_path):
    whole = child_adamw(make_params(dtype=dtype), backend=backend, **options)
    train(whole, range(5))
    for stop in (1, 3):
        first = child_adamw(make_params(dtype=dtype), backend=backend, **options)
        train(first, range(stop))
        checkpoint = saved_and_loaded(first, tmp_path / "checkpoint.pt")
        resumed = ChildAdamW([torch.nn.Parameter(p) for p in checkpoint["params"]], seed=99, backend=backend)
        resumed.load_state_dict(checkpoint["optimizer"])
        train(resumed, range(stop, 5))
        assert_same_run(whole, resumed)


RESUME = """
import sys
sys.path.insert(0, "tests/support")
import torch
from helpers import train
from childtune_fast import ChildAdamW
for path in sys.stdin.read().split():
    checkpoint = torch.load(path, weights_only=True)
    params = [torch.nn.Parameter(p) for p in checkpoint["params"]]
    optimizer = ChildAdamW(params, backend="native")
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(optimizer, range(2, 4))
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, path)
"""


def test_resume_in_a_new_process(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    paths, runs = [tmp_path / f"{i}.pt" for i in range(3)], []
    for dtype, path in zip(dtypes, paths, strict=True):
        run = child_adamw(make_params(dtype=dtype), amsgrad=True, backend="native")
        train(run, range(2))
        saved_and_loaded(run, path)
        train(run, range(2, 4))
        runs.append(run)
    result_of(python(RESUME.replace("sys.stdin.read().split()", repr([str(p) for p in paths]))))
    for run, path in zip(runs, paths, strict=True):
        checkpoint = torch.load(path, weights_only=True)
        resumed = child_adamw([torch.nn.Parameter(p) for p in checkpoint["params"]])
        resumed.load_state_dict(checkpoint["optimizer"])
        assert_same_run(run, resumed)


def test_what_a_checkpoint_holds():
    optimizer = child_adamw(make_params(dtype=torch.bfloat16), amsgrad=True)
    train(optimizer, [0])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["seed"] == 7
    assert saved["param_groups"][0]["mask_version"] == 1
    for state in saved["state"].values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in state.values())


FLAVOURS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True, "foreach": False},
}


@both_backends
@every_dtype
@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_from_torch(flavour, dtype, backend, tmp_path):
    theirs = torch.optim.AdamW(make_params(dtype=dtype), lr=0.02, **flavour)
    train(theirs, range(2))
    checkpoint = saved_and_loaded(theirs, tmp_path / "checkpoint.pt")
    params = [torch.nn.Parameter(p) for p in checkpoint["params"]]
    optimizer = child_adamw(params, reserve_p=0.5, backend=backend)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert (optimizer.param_groups[0]["reserve_p"], optimizer.seed) == (0.5, 7)
    for p, saved in zip(params, checkpoint["optimizer"]["state"].values(), strict=True):
        state = optimizer.state[p]
        assert state.keys() == saved.keys()
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(same_bits(state[k], v.to(torch.float32 if k == "step" else compute)) for k, v in saved.items())
    train(optimizer, [2])
    assert all(optimizer.state[p]["step"] == 3 for p in params)


@every_dtype
@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_into_torch(flavour, dtype, tmp_path):
    """torch takes our state, cast to the parameter's dtype as it casts its own, and goes on as from its own."""
    ours = child_adamw(make_params(dtype=dtype), amsgrad=flavour.get("amsgrad", False))
    train(ours, range(2))
    checkpoint = saved_and_loaded(ours, tmp_path / "checkpoint.pt")
    runs = []
    for strip in (False, True):
        saved = copy.deepcopy(checkpoint)
        if strip:  # to what torch's own checkpoint would hold
            for state in saved["optimizer"]["state"].values():
                state.update({k: v.to(dtype) for k, v in state.items() if k != "step"})
            options = torch.optim.AdamW(make_params()).state_dict()["param_groups"][0]
            group = saved["optimizer"]["param_groups"][0]
            saved["optimizer"]["param_groups"] = [{k: group[k] for k in options}]
        theirs = torch.optim.AdamW([torch.nn.Parameter(p) for p in saved["params"]], **flavour)
        theirs.load_state_dict(saved["optimizer"])
        train(theirs, [2])
        runs.append(theirs)
    assert_same_run(*runs)
    assert all(state["step"] == 3 for state in runs[0].state.values())


@both_backends
def test_older_state_dicts(backend):
    """torch 1.x stored `step` as a number, and had neither maximize nor the options that came later."""
    whole, run = child_adamw(make_params(), backend=backend), child_adamw(make_params(), backend=backend)
    train(whole, range(2))
    train(run, range(2))
    saved = copy.deepcopy(run.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"].item())
    keep = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
    saved["param_groups"] = [{k: group[k] for k in keep} for group in saved["param_groups"]]
    run.load_state_dict(saved)
    train(whole, [2])
    train(run, [2])
    assert_same_run(whole, run)


@both_backends
def test_state_of_some_parameters_only(backend):
    params = make_params()
    run = child_adamw(params, backend=backend)
    set_grads(params, 0)
    params[1].grad = None
    run.step()
    other = child_adamw(make_params(), backend=backend)
    train(other, range(3))
    other.load_state_dict(run.state_dict())
    counts = [other.state[p]["step"].item() if p in other.state else None for p in other.param_groups[0]["params"]]
    assert counts == [1, None, 1, 1, 1]


def test_the_checkpoint_s_seed_wins():
    run, other = child_adamw(make_params(), seed=1), child_adamw(make_params(), seed=2)
    other.load_state_dict(run.state_dict())
    assert other.seed == 1
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert [group["seed"] for group in other.param_groups] == [1, 1]
    again = copy.deepcopy(other)
    again.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert again.param_groups[2]["seed"] == 1


def test_what_was_chosen_for_this_process_stays():
    """Of a checkpoint, `foreach`, `fused` and `backend` say how it was made, not how to go on."""
    fused = torch.optim.AdamW(make_params(), fused=True)
    train(fused, [0])
    optimizer = child_adamw(make_params(), backend="torch")
    optimizer.load_state_dict(fused.state_dict())
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.backend == "torch"


@both_backends
def test_the_loaded_state_is_a_copy(backend):
    run = child_adamw(make_params(), backend=backend)
    train(run, [0])
    saved = run.state_dict()
    kept = copy.deepcopy(saved)
    other = child_adamw(make_params(), backend=backend)
    other.load_state_dict(saved)
    train(other, [1])
    for i, state in kept["state"].items():
        assert all(same_bits(state[k], saved["state"][i][k]) for k in state)
    assert saved["param_groups"] == kept["param_groups"]


def test_named_parameters_load_by_position_as_in_torch():
    a, b = make_params(((3,), (3,)))
    run = child_adamw([("a", a), ("b", b)])
    train(run, [0])
    other = child_adamw([("b", b), ("a", a)])
    other.load_state_dict(run.state_dict())
    assert same_bits(other.state[b]["exp_avg"], run.state[a]["exp_avg"])
    assert other.param_groups[0]["param_names"] == ["a", "b"]
    unnamed = child_adamw([a, b])
    unnamed.load_state_dict(run.state_dict())
    assert same_bits(unnamed.state[a]["exp_avg"], run.state[a]["exp_avg"])


def group_with(**options):
    def change(saved):
        saved["param_groups"][0].update(options)

    return change


def without_last_parameter(saved):
    saved["param_groups"][0]["params"].pop()


def without_groups(saved):
    saved["param_groups"].clear()


def state_with(**entries):
    def change(saved):
        saved["state"][3].update(entries)

    return change


def state_without_step(saved):
    del saved["state"][3]["step"]


BAD = {
    "no tensor": (state_with(exp_avg=[1.0]), "state 'exp_avg' of parameter 3 must be a tensor"),
    "step is no number": (state_with(step="x"), "could not convert|must be"),
    "two steps": (state_with(step=torch.ones(2)), "state 'step' of parameter 3 must be one number"),
    "no step": (state_without_step, "step"),
    "mask version": (group_with(mask_version=2), "masks are of version 2, those of this childtune_fast of version 1"),
    "reserve_p": (group_with(reserve_p=1.5), "must lie in"),
    "variant": (group_with(variant="other"), "variant must be"),
    "seed of another type": (group_with(seed="7"), "seed must be an integer"),
    "seed too large": (group_with(seed=1 << 64), "seed must fit in 64 bits"),
    "fewer parameters": (without_last_parameter, "doesn't match the size"),
    "no groups": (without_groups, "different number of parameter groups"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints_change_nothing(change, message):
    other = child_adamw(make_params(), seed=1)
    train(other, range(3))
    saved = other.state_dict()
    change(saved)
    run, expected = child_adamw(make_params()), child_adamw(make_params())
    train(run, [0])
    train(expected, [0])
    with pytest.raises((ValueError, TypeError, RuntimeError, KeyError), match=message):
        run.load_state_dict(saved)
    train(run, [1])
    train(expected, [1])
    assert_same_run(run, expected)
    assert run.seed == 7
