"""State in fewer bits: what is refused, in which words, before anything has been written."""

import re

import pytest
import torch
from helpers import both_backends, child_adamw, make_params, same_snapshot, set_grads, snapshot, train
from low_bit import KINDS, every_kind, params_of

from childtune_fast import ChildAdamW
from childtune_fast.optimizer import checks

REMEDY = re.escape("optimizer.load_state_dict(optimizer.state_dict()) converts it")

WORDS = {
    "state": ("int8", "state must be 'float32', 'bfloat16' or '8bit' (got 'int8')"),
    "rounding": ("up", "must be 'nearest' or 'stochastic' (got 'up')"),
}


@pytest.mark.parametrize(("name", "word", "message"), [(n, *v) for n, v in WORDS.items()])
def test_unknown_words(name, word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        child_adamw(params_of(), **{name: word})
    optimizer = child_adamw(params_of())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": params_of(), name: word})
    assert len(optimizer.param_groups) == 1
    for odd in (word, None, 8, ["8bit"]):
        optimizer.param_groups[0][name] = odd
        set_grads(optimizer.param_groups[0]["params"], 0)
        with pytest.raises(ValueError, match=re.escape(message.partition(" (got")[0])):
            optimizer.step()
        assert not optimizer.state


@every_kind
def test_float64_parameters_need_float_state(state):
    message = f"state='{state}' needs parameters of at most 32 bits (got a float64 one of shape (5, 3))"
    params = make_params(((5, 3),), torch.float64)
    with pytest.raises(ValueError, match=re.escape(message)):
        child_adamw(params, state=state)
    optimizer = child_adamw(params_of(), state=state)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": params})
    optimizer.add_param_group({"params": params, "state": "float32", "rounding": "stochastic"})
    frozen = make_params(((5, 3),), torch.float64)[0].requires_grad_(False)
    optimizer.add_param_group({"params": [frozen]})
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float64
    frozen.requires_grad_().grad = torch.ones_like(frozen)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()


@both_backends
@pytest.mark.parametrize("old", ["float32", *KINDS])
@pytest.mark.parametrize("new", ["float32", *KINDS])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_another_word_needs_a_conversion(old, new, amsgrad, backend):
    params = params_of()
    optimizer = child_adamw(params, state=old, amsgrad=amsgrad, backend=backend)
    train(optimizer, [0])
    optimizer.param_groups[0]["state"] = new
    set_grads(params, 1)
    before = snapshot(optimizer)
    if new != old:
        with pytest.raises(ValueError, match=f"must be stored as its group says, in {new} \\(got {old}\\); {REMEDY}"):
            optimizer.step()
        assert same_snapshot(snapshot(optimizer), before)
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2
    assert ("exp_avg_codes" in optimizer.state[params[0]]) == (new == "8bit")
    assert "exp_avg" in optimizer.state[params[3]]


def test_another_word_with_amsgrad_begins_nothing():
    """amsgrad that is switched on together with another word begins a maximum, which is undone."""
    params = params_of()
    optimizer = child_adamw(params, state="8bit")
    train(optimizer, [0])
    optimizer.param_groups[0].update(state="float32", amsgrad=True)
    before = snapshot(optimizer)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=REMEDY):
        optimizer.step()
    assert same_snapshot(snapshot(optimizer), before)


@both_backends
@every_kind
def test_amsgrad_may_come_later(state, backend):
    params = params_of()
    optimizer = child_adamw(params, state=state, backend=backend)
    train(optimizer, [0])
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, [1])
    key = "max_exp_avg_sq_codes" if state == "8bit" else "max_exp_avg_sq"
    assert optimizer.state[params[0]][key].any()


def strided(tensor):
    return torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)[::2].view(tensor.shape).copy_(tensor)


SPOILT = {
    "codes of another dtype": ("exp_avg_codes", lambda t: t.float(), "must be torch.uint8 (got torch.float32)"),
    "codes of another shape": ("exp_avg_sq_codes", lambda t: t[1:], "must have the shape (70, 64) (got (69, 64))"),
    "codes with strides": ("exp_avg_codes", lambda t: t.t().contiguous().t(), "must be contiguous (got strides"),
    "no codes": ("exp_avg_codes", lambda t: None, "must be a tensor (got NoneType)"),
    "scales of another dtype": ("exp_avg_scales", lambda t: t.int(), "must be torch.uint8 (got torch.int32)"),
    "scales of another shape": ("exp_avg_scales", lambda t: t[:-1], "must have the shape (35,) (got (34,))"),
    "scales with strides": ("max_exp_avg_sq_scales", strided, "must be contiguous (got strides"),
    "scales elsewhere": ("exp_avg_sq_scales", lambda t: t.to("meta"), "must be on the parameter's device cpu"),
}


@both_backends
@pytest.mark.parametrize(("key", "change", "message"), SPOILT.values(), ids=SPOILT)
def test_spoilt_state(key, change, message, backend):
    params = params_of()
    optimizer = child_adamw(params, state="8bit", amsgrad=True, backend=backend)
    train(optimizer, [0])
    optimizer.state[params[0]][key] = change(optimizer.state[params[0]][key])
    set_grads(params, 1)
    before = snapshot(optimizer)
    expected = f"state '{key}' of parameter 0 of shape (70, 64) {message}"
    with pytest.raises((TypeError, ValueError), match=re.escape(expected)):
        optimizer.step()
    assert same_snapshot(snapshot(optimizer), before)


@both_backends
@pytest.mark.parametrize("key", ["exp_avg_codes", "exp_avg_sq_scales", "step"])
def test_missing_state(key, backend):
    params = params_of()
    optimizer = child_adamw(params, state="8bit", backend=backend)
    train(optimizer, [0])
    del optimizer.state[params[0]][key]
    with pytest.raises(ValueError, match=f"'{key}' is missing in a group or in the state of a parameter"):
        train(optimizer, [1])


@both_backends
def test_scales_must_lie_apart(backend):
    params = params_of()
    optimizer = child_adamw(params, state="8bit", backend=backend)
    train(optimizer, [0])
    state = optimizer.state[params[0]]
    state["exp_avg_scales"] = state["exp_avg_sq_scales"]
    with pytest.raises(ValueError, match="the state that a step writes"):
        train(optimizer, [1])


@every_kind
def test_zero_redundancy_is_refused(state):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_called_from", lambda module: True)
        plain = {"reserve_p": 1, "max_grad_norm": None}
        with pytest.raises(ValueError, match=re.escape(f"alone (got state={state})")):
            ChildAdamW(params_of(), state=state, **plain)
        with pytest.raises(ValueError, match=re.escape("alone (got rounding=stochastic)")):
            ChildAdamW(params_of(), rounding="stochastic", **plain)
        ChildAdamW(params_of(), **plain)
