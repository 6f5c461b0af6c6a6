"""Checkpoints of state in fewer bits: resuming bit for bit, conversions, exchange with torch, and damaged ones."""

import copy
import re

import pytest
import torch
from helpers import assert_same_run, both_backends, same_bits, same_snapshot, set_grads, snapshot, train
from low_bit import AVERAGES, KINDS, decoded, every_kind, every_mode, model_of, optimizer_of

from childtune_fast import ChildAdamW
from childtune_fast.ops.codes import NEAREST, block_count, block_numbers, encode_average, encode_square

ALL_KINDS = ("float32", *KINDS)


def trained(mode, state, steps=3, **options):
    model = model_of(options.pop("dtype", torch.float32))
    optimizer = optimizer_of(mode, model, state=state, **options)
    train(optimizer, range(steps))
    return model, optimizer


def child_of(model, optimizer, param):
    """The bool mask of a parameter; None for one without."""
    mask = optimizer.child_masks.get(param)
    return None if mask is None else mask.unpack()


def floats_of(state, child=None):
    """The averages of a state as float32, whatever it stores."""
    return {
        key: state[key].float() if key in state else decoded(state, key, child)
        for key in AVERAGES
        if key in state or f"{key}_codes" in state
    }


@both_backends
@every_mode
@every_kind
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")])
def test_resume_equals_no_interruption(dtype, rounding, state, mode, backend, tmp_path):
    options = {"rounding": rounding, "amsgrad": True, "backend": backend}
    _, whole = trained(mode, state, 4, dtype=dtype, **options)
    model, first = trained(mode, state, 2, dtype=dtype, **options)
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed_model = model_of(dtype, seed=9)
    resumed_model.load_state_dict(saved["model"])
    resumed = ChildAdamW(resumed_model.parameters(), seed=99, state=state, backend=backend)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["rounding"] == rounding
    train(resumed, range(2, 4))
    assert_same_run(whole, resumed)


@every_mode
@pytest.mark.parametrize("saved", ALL_KINDS)
@pytest.mark.parametrize("loaded", ALL_KINDS)
def test_a_checkpoint_is_stored_as_the_optimizer_says(saved, loaded, mode):
    model, first = trained(mode, saved, amsgrad=True)
    other = copy.deepcopy(model)
    second = optimizer_of("F", other, state=loaded, amsgrad=True)
    checkpoint = first.state_dict()
    second.load_state_dict(checkpoint)
    assert second.param_groups[0]["state"] == loaded
    for param, same in zip(model.parameters(), other.parameters(), strict=True):
        child = child_of(model, first, param)
        before, after = first.state[param], second.state[same]
        kinds = (saved, loaded) if param.numel() >= 4096 else ("float32", "float32")
        assert after["step"] == 3
        for key, value in floats_of(before, child).items():
            if kinds[0] == kinds[1]:
                names = [key] if kinds[0] != "8bit" else [f"{key}_codes", f"{key}_scales"]
                assert all(same_bits(after[name], before[name]) for name in names)
                assert all(after[name].data_ptr() != before[name].data_ptr() for name in names if value.numel())
            elif kinds[1] == "8bit":
                blocks = block_numbers(param.numel(), None if child is None else child.reshape(-1), value.device)
                encode = encode_average if key == "exp_avg" else encode_square
                codes, scales = encode(value.reshape(-1), blocks, block_count(param.numel()), NEAREST)
                assert same_bits(after[f"{key}_codes"], codes.view(value.shape))
                assert same_bits(after[f"{key}_scales"], scales)
            else:
                dtype = torch.bfloat16 if kinds[1] == "bfloat16" else torch.float32
                assert same_bits(after[key], value.to(dtype))
    train(second, [3])
    assert all(state["step"] == 4 for state in second.state.values())


@both_backends
def test_the_rounding_goes_on_from_where_it_was(backend):
    """Its bits follow from seed and step count: an optimizer of another seed that loads takes the checkpoint's."""
    _, first = trained("p = 1", "8bit", 2, backend=backend)
    model = model_of()
    for seed, same in ((7, True), (8, False)):
        model, other = model_of(), None
        other = optimizer_of("p = 1", model, state="8bit", seed=seed, backend=backend)
        train(other, range(2))
        key = "exp_avg_codes"
        assert torch.equal(other.state[model.p0][key], next(iter(first.state.values()))[key]) == same


@both_backends
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_torch(dtype, amsgrad, backend):
    model = model_of(dtype)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=amsgrad)
    train(theirs, range(2))
    for mode in ("p = 1", "D"):
        other = copy.deepcopy(model)
        optimizer = optimizer_of(mode, other, state="8bit", amsgrad=amsgrad, backend=backend)
        optimizer.load_state_dict(theirs.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.02
        for param, saved in zip(other.parameters(), theirs.state.values(), strict=True):
            child = child_of(other, optimizer, param)
            for key, value in floats_of(optimizer.state[param], child).items():
                inside = saved[key].float() if child is None else saved[key].float()[child]
                if param.numel() < 4096:
                    assert same_bits(value, inside)
                    continue
                # To nearest, a code is wrong by half a step: of a value above 2^-15 of the scale by 1 / 16, of a
                # smaller average by 2^-19 of the scale, and no square is below 2^-31 of it. The scale is less than
                # 2 / 1.875 of the block's largest.
                least = inside.abs().max() * (2.0**-18 if key == "exp_avg" else 2.0**-30)
                assert ((value - inside).abs() <= inside.abs() / 16 + least).all()
        train(optimizer, [2])
        assert optimizer.state[other.p0]["step"] == 3


@every_mode
@pytest.mark.parametrize("state", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_torch(dtype, state, mode):
    model, optimizer = trained(mode, state, amsgrad=True, dtype=dtype)
    dense = optimizer.dense_state_dict()
    other = copy.deepcopy(model)
    theirs = torch.optim.AdamW(other.parameters(), amsgrad=True)
    theirs.load_state_dict(dense)
    for param, same in zip(model.parameters(), other.parameters(), strict=True):
        child = child_of(model, optimizer, param)
        assert theirs.state[same].keys() == {"step", *AVERAGES}
        for key, value in floats_of(optimizer.state[param], child).items():
            expected = value
            if child is not None:
                expected = torch.zeros(param.shape).masked_scatter_(child, value)
            assert same_bits(theirs.state[same][key], expected.to(dtype))
    train(theirs, [3])


def test_torch_does_not_take_codes_for_averages():
    model, optimizer = trained("p = 1", "8bit")
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    set_grads(list(model.parameters()), 0)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()


@every_kind
@pytest.mark.parametrize("of_child", [True, False])
def test_dense_and_compact(state, of_child):
    """A dense checkpoint gives a child network the codes of its values, and their scales as they are."""
    model, dense = trained("p = 1", state)
    other = copy.deepcopy(model)
    optimizer = optimizer_of("D", other, state=state)
    optimizer.load_state_dict(dense.state_dict() if of_child else dense.dense_state_dict())
    for (name, param), same in zip(model.named_parameters(), other.parameters(), strict=True):
        before, after, mask = dense.state[param], optimizer.state[same], model.masks.get(name)
        names = [key for key in after if key != "step" and (of_child or ("codes" not in key and "scales" not in key))]
        assert names or not of_child
        for key in names:
            compact = mask is not None and "scales" not in key
            assert same_bits(after[key], before[key][mask] if compact else before[key])
    train(optimizer, [3])


def test_what_a_checkpoint_holds():
    _, optimizer = trained("D", "8bit")
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rounding_version"] == 1
    assert saved["state"][0].keys() == {
        *("step", "child_mask", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"),
    }


# ---- Damaged checkpoints -------------------------------------------------------------------------------------------


def with_state(**changes):
    def change(saved):
        for key, of_value in changes.items():
            saved["state"][0][key] = of_value(saved["state"][0].get(key))

    return change


def without(key):
    def change(saved):
        del saved["state"][0][key]

    return change


def with_scale(byte):
    def change(scales):
        scales = scales.clone()
        scales[3] = byte
        return scales

    return change


def with_version(saved):
    saved["param_groups"][0]["rounding_version"] = 2


SHAPE = "must have the shape (70, 64) (got (69, 64))"
DAMAGED = {
    "codes of another dtype": (with_state(exp_avg_codes=torch.Tensor.float), "must be a tensor of uint8 with values"),
    "codes of another shape": (with_state(exp_avg_codes=lambda t: t[1:]), f"'exp_avg_codes' {SHAPE}"),
    "codes without values": (with_state(exp_avg_sq_codes=lambda t: t.to("meta")), "must be a tensor of uint8 with"),
    "codes are no tensor": (with_state(exp_avg_sq_codes=torch.Tensor.tolist), "must be a tensor (got list)"),
    "no codes": (without("exp_avg_codes"), "must have 'exp_avg_codes' (got ['"),
    "no scales": (without("exp_avg_sq_scales"), "must have 'exp_avg_sq_scales' (got ['"),
    "no scales of the maximum": (without("max_exp_avg_sq_scales"), "must have 'max_exp_avg_sq_scales' (got ['"),
    "no codes of the maximum": (without("max_exp_avg_sq_codes"), "must have 'max_exp_avg_sq_codes' (got ['"),
    "no step": (without("step"), "must have 'step' (got ['"),
    "floats beside codes": (with_state(exp_avg=lambda t: torch.zeros(70, 64)), "averages once (got floats and codes)"),
    "scales of another dtype": (with_state(exp_avg_scales=torch.Tensor.int), "must be a tensor of uint8 with values"),
    "scales of another shape": (with_state(exp_avg_scales=lambda t: t[1:]), "must have 35 values, for as many blocks"),
    "a scale below the least": (with_state(exp_avg_scales=with_scale(31)), "must be 0, or lie in 32 to 253"),
    "a scale above the most": (with_state(exp_avg_sq_scales=with_scale(254)), "must be 0, or lie in 32 to 253"),
    "another version": (with_version, "random roundings are of version 2, those of this childtune_fast of version 1"),
}


@pytest.mark.parametrize("mode", ["p = 1", "D"])
@pytest.mark.parametrize("loaded", ["8bit", "float32"])
@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoints_change_nothing(change, message, loaded, mode):
    _, first = trained(mode, "8bit", amsgrad=True)
    saved = first.state_dict()
    saved["state"][0] = dict(saved["state"][0])
    change(saved)
    if mode == "D":
        message = message.replace("(70, 64) (got (69, 64))", "(")
    _, optimizer = trained("F", loaded, 1, amsgrad=True)
    before, groups = snapshot(optimizer), copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        optimizer.load_state_dict(saved)
    assert same_snapshot(snapshot(optimizer), before)
    assert [{**g, "params": None} for g in optimizer.param_groups] == groups


@pytest.mark.parametrize("byte", [0, 32, 253])
def test_every_scale_that_a_step_makes_is_taken(byte):
    _, first = trained("p = 1", "8bit")
    saved = copy.deepcopy(first.state_dict())
    with_state(exp_avg_scales=with_scale(byte))(saved)
    for state in ALL_KINDS:
        model = model_of()
        optimizer = optimizer_of("p = 1", model, state=state)
        optimizer.load_state_dict(saved)
        train(optimizer, [3])


@pytest.mark.parametrize("key", ["exp_avg_codes", "exp_avg_scales"])
def test_a_dense_checkpoint_of_spoilt_state_is_refused(key):
    model, optimizer = trained("D", "8bit")
    optimizer.state[model.p0][key] = None
    with pytest.raises(TypeError, match=f"dense_state_dict: state '{key}' must be a tensor"):
        optimizer.dense_state_dict()
