"""State in fewer bits, and rounding: which parameter gets what, and that both backends agree."""

import copy
import pickle

import pytest
import torch
from helpers import (
    assert_same_run,
    both_backends,
    child_adamw,
    make_params,
    same_bits,
    set_grads,
    train,
)
from low_bit import KINDS, LARGE, SHAPES, every_kind, every_mode, model_of, optimizer_of

from childtune_fast import ChildNetwork


@both_backends
@every_mode
@pytest.mark.parametrize("amsgrad", [False, True])
def test_large_parameters_have_bytes_and_small_ones_floats(mode, amsgrad, backend):
    model = model_of(torch.bfloat16)
    optimizer = optimizer_of(mode, model, state="8bit", amsgrad=amsgrad, backend=backend)
    train(optimizer, range(2))
    masks = optimizer.child_masks
    for param in model.parameters():
        state = optimizer.state[param]
        averages = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
        shape = (masks[param].count,) if param in masks else tuple(param.shape)
        if param.numel() < 4096:
            assert list(state) == ["step", *averages]
            assert all(state[key].dtype == torch.float32 and state[key].shape == shape for key in averages)
            continue
        assert list(state) == ["step", *(f"{key}_{part}" for key in averages for part in ("codes", "scales"))]
        for key in averages:
            codes, scales = state[f"{key}_codes"], state[f"{key}_scales"]
            assert codes.dtype == scales.dtype == torch.uint8
            assert codes.is_contiguous()
            assert codes.shape == shape
            assert scales.shape == (-(-param.numel() // 128),)
            assert codes.any()
            assert scales.all()


@both_backends
@every_mode
def test_bfloat16_state_has_the_names_of_floats(mode, backend):
    model = model_of()
    optimizer = optimizer_of(mode, model, state="bfloat16", amsgrad=True, backend=backend)
    train(optimizer, range(2))
    for param in model.parameters():
        state = optimizer.state[param]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        dtype = torch.bfloat16 if param.numel() >= 4096 else torch.float32
        assert all(state[key].dtype == dtype for key in list(state)[1:])


def test_the_least_size_is_that_of_the_whole_parameter():
    params = make_params(((4095,), (4096,)))
    optimizer = child_adamw(params, state="8bit", backend="torch")
    train(optimizer, [0])
    assert "exp_avg" in optimizer.state[params[0]]
    assert "exp_avg_codes" in optimizer.state[params[1]]


@both_backends
def test_groups_may_differ(backend):
    """A group's steps are those of an optimizer of its own kind, whatever other groups have."""
    shapes = [(70, 64)] * 3
    params, others = make_params(shapes), make_params(shapes)
    words = ("float32", "bfloat16", "8bit")
    groups = [{"params": [p], "state": word} for p, word in zip(params, words, strict=True)]
    optimizer = child_adamw(groups, backend=backend)
    train(optimizer, range(3))
    for i, word in enumerate(words):
        alone = child_adamw(others, state=word, backend=backend)
        for p, start in zip(others, make_params(shapes), strict=True):
            p.data = start.data
        train(alone, range(3))
        assert same_bits(params[i], others[i])
        ours, theirs = optimizer.state[params[i]], alone.state[others[i]]
        assert list(ours) == list(theirs)
        assert all(same_bits(ours[key], theirs[key]) for key in ours)
    assert not same_bits(optimizer.state[params[0]]["exp_avg"], optimizer.state[params[1]]["exp_avg"].float())


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"variant": "hf", "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("state", "rounding"),
    [("8bit", "nearest"), ("8bit", "stochastic"), ("bfloat16", "nearest"), ("float32", "stochastic")],
)
def test_both_backends_take_the_same_steps(mode, dtype, options, state, rounding):
    runs = []
    for backend in ("native", "torch"):
        run = optimizer_of(mode, model_of(dtype), state=state, rounding=rounding, backend=backend, **options)
        train(run, range(4))
        runs.append(run)
    assert_same_run(*runs)


@both_backends
@pytest.mark.parametrize("state", ["float32", *KINDS])
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last"])
def test_strides_do_not_matter(state, layout, backend):
    def param_of(start):
        if layout == "transposed":
            return torch.nn.Parameter(start.t().contiguous().t())
        if layout == "strided":
            return torch.nn.Parameter(torch.zeros(start.shape[0], 3 * start.shape[1])[:, ::3].copy_(start))
        return torch.nn.Parameter(start.view(8, 5, 11, 10).to(memory_format=torch.channels_last))

    start = make_params(((8, 550),), torch.float32)[0].detach()
    param, plain = param_of(start), torch.nn.Parameter(start.clone())
    options = {"state": state, "rounding": "stochastic", "amsgrad": True, "backend": backend}
    optimizer, expected = child_adamw([param], **options), child_adamw([plain], **options)
    for step in range(3):
        set_grads([plain], step)
        param.grad = plain.grad.view(param.shape)
        optimizer.step()
        expected.step()
    assert same_bits(param.detach().reshape(start.shape), plain.detach())
    for key, value in expected.state[plain].items():
        assert same_bits(optimizer.state[param][key].reshape(value.shape), value), key


def test_stochastic_rounding_does_nothing_for_32_bits_and_64():
    for dtype in (torch.float32, torch.float64):
        runs = []
        for rounding in ("nearest", "stochastic"):
            runs.append(child_adamw(make_params(dtype=dtype), rounding=rounding, backend="torch"))
            train(runs[-1], range(3))
        assert_same_run(*runs)


@both_backends
def test_stochastic_rounding_moves_weights_that_rounding_to_nearest_holds(backend):
    """A step of 1e-5 on bfloat16 weights of 1 is 1 / 780 of their spacing above. After 100, one in 8 has moved."""
    moved = []
    for rounding in ("nearest", "stochastic"):
        param = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
        optimizer = child_adamw(
            [param], lr=1e-5, reserve_p=1, weight_decay=0, maximize=True, rounding=rounding, backend=backend
        )
        param.grad = torch.ones_like(param)
        for _ in range(100):
            optimizer.step()
        moved.append(param.detach().double().mean().item() - 1)
    assert moved[0] == 0
    # Each element moves by 2^-7 with a probability of at most 1 / 8, in blocks of 128 that are independent: the mean's
    # standard error is at most 2^-7 * sqrt(1 / 8 / 128) = 2.4e-4. It is less as the bits of a block are spread evenly.
    assert moved[1] == pytest.approx(1e-3, abs=2.4e-4)


# ---- Copies --------------------------------------------------------------------------------------------------------


@every_mode
@every_kind
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on(copy_of, state, mode):
    model = model_of(torch.bfloat16)
    optimizer = optimizer_of(mode, model, state=state, rounding="stochastic", backend="native")
    train(optimizer, range(2))
    _, other = copy_of((model, optimizer))
    assert other.param_groups[0]["rounding"] == "stochastic"
    train(other, range(2, 4))
    train(optimizer, range(2, 4))
    assert_same_run(optimizer, other)


@every_kind
def test_replace_child_begins_the_state_anew(state):
    model, other = model_of(), model_of(seed=5)
    for name, mask in other.masks.items():
        model.masks[name], other.masks[name] = mask, model.masks[name]
    optimizer = optimizer_of("D", model, state=state, backend="native")
    train(optimizer, range(2))
    child = ChildNetwork.from_masks(model, other.masks)
    optimizer.replace_child(child)
    train(optimizer, range(2, 4))
    key = "exp_avg_codes" if state == "8bit" else "exp_avg"
    assert optimizer.state[model.p0]["step"] == 2
    assert optimizer.state[model.p0][key].shape == (int(other.masks["p0"].sum()),)
    assert optimizer.state[model.p4]["step"] == 4


@both_backends
@every_mode
def test_a_skipped_step_and_a_closure_that_raises_leave_no_state(mode, backend):
    model = model_of()
    optimizer = optimizer_of(mode, model, state="8bit", backend=backend)
    set_grads(list(model.parameters()), 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert not optimizer.state
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    assert len(optimizer.state) == len(SHAPES)
    assert len(LARGE) == sum("exp_avg_codes" in state for state in optimizer.state.values())
