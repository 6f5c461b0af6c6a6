"""Nonsense in groups and state: a sentence instead of Python's own errors, nothing written, a good step afterwards."""

import collections
import copy
import re

import pytest
import torch
from helpers import both_backends, child_adamw, same_snapshot, set_grads, snapshot, train
from torch.nn import Parameter

from childtune_fast import ChildAdamW, ChildNetwork


def param(*shape, dtype=torch.float32):
    return Parameter(torch.ones(shape or (4, 3), dtype=dtype))


def option(**options):
    return lambda optimizer: optimizer.param_groups[1].update(options)


def without(*names):
    return lambda optimizer: [optimizer.param_groups[1].pop(name) for name in names]


def with_groups(groups):
    return lambda optimizer: setattr(optimizer, "param_groups", groups)


def with_params(make):
    def change(optimizer):
        group = optimizer.param_groups[1]
        group["params"] = make(group["params"])

    return change


def with_state(state):
    return lambda optimizer: setattr(optimizer, "state", state)


def state_of_first(make):
    def change(optimizer):
        first = optimizer.param_groups[0]["params"][0]
        optimizer.state[first] = make(optimizer.state[first])

    return change


def twice_across(optimizer):
    optimizer.param_groups[1]["params"] = optimizer.param_groups[0]["params"][:1]


def entry_less(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


NOT_A_NUMBER = [None, "x", "0.5", b"1", 1 + 1j, [], torch.ones(2), torch.ones((), device="meta"), 10**400]
BELOW = [-1.0, float("nan"), float("inf"), -1, torch.tensor(-1.0), torch.tensor(float("nan"))]
NOT_TWO = [(), None, 0.9, (0.9,), (0.9, 0.99, 0.999), torch.tensor(0.9)]
OUTSIDE = [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (float("nan"), 0.9), (0.9, float("nan")), (0.9, 2)]
ROWS = [
    *((option(lr=x), TypeError, "lr must be a number, or a tensor of one") for x in NOT_A_NUMBER),
    *((option(lr=x), ValueError, "lr must be a finite number (got") for x in [float("nan"), float("inf")]),
    *((option(eps=x), TypeError, "eps must be a number, or a tensor of one") for x in NOT_A_NUMBER),
    *((option(eps=x), ValueError, "eps must be a finite number of at least 0 (got") for x in BELOW),
    *((option(weight_decay=x), TypeError, "weight_decay must be a number") for x in NOT_A_NUMBER),
    *((option(weight_decay=x), ValueError, "weight_decay must be a finite number of at least 0") for x in BELOW),
    *((option(betas=x), TypeError, "betas must be two numbers in [0, 1) (got") for x in NOT_TWO),
    *((option(betas=x), ValueError, "must lie in [0, 1) (got") for x in OUTSIDE),
    *((option(betas=(0.9, x)), TypeError, "betas[1] must be a number, or a tensor") for x in NOT_A_NUMBER),
    (option(betas="ab"), TypeError, "betas[0] must be a number, or a tensor of one (got str 'a')"),
    (option(seed="x"), ValueError, "seed is one for the whole optimizer"),
    (option(decay=[]), ValueError, "decay must be 'auto', 'all' or 'child' (got [])"),
    *(
        (without(name), ValueError, f"'{name}' is missing in a group")
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "reserve_p", "decay", "seed")
    ),
    (without("params"), ValueError, "param_groups[1] must have 'params', the list of its parameters"),
    (with_groups(None), TypeError, "param_groups must be a list of dicts (got NoneType)"),
    (with_groups([1]), TypeError, "param_groups[0] must be a dict (got int)"),
    (with_groups([{}]), ValueError, "param_groups[0] must have 'params'"),
    (with_groups("x"), TypeError, "param_groups must be a list of dicts (got str)"),
    (with_params(lambda _: "x"), TypeError, "must be a list of parameters (got str 'x')"),
    (with_params(lambda _: None), TypeError, "must be a list of parameters (got NoneType)"),
    (with_params(lambda _: 5), TypeError, "must be a list of parameters (got int 5)"),
    (with_params(lambda params: params[0]), TypeError, "must be a list of parameters (got a tensor of shape (5,)"),
    (with_params(iter), TypeError, "must be a list of parameters (got list_iterator)"),
    (with_params(lambda params: [*params, "x"]), TypeError, "['params'][2] must be a tensor (got str)"),
    (with_params(lambda params: [None, *params]), TypeError, "['params'][0] must be a tensor (got NoneType)"),
    (with_params(lambda params: params * 2), ValueError, "in the groups once (got one of shape (5,) 2 times)"),
    (twice_across, ValueError, "in the groups once (got one of shape (4, 3) 2 times)"),
    (with_state(None), TypeError, "state must be a mapping of parameters to dicts (got NoneType)"),
    (with_state([]), TypeError, "state must be a mapping of parameters to dicts (got list)"),
    (with_state({}), TypeError, "state must be a collections.defaultdict(dict)"),
    (with_state(collections.defaultdict(int)), TypeError, "the state of parameter 0 must be a dict (got int)"),
    (state_of_first(lambda _: None), TypeError, "the state of parameter 0 must be a dict (got NoneType)"),
    (state_of_first(lambda _: [1]), TypeError, "the state of parameter 0 must be a dict (got list)"),
    (state_of_first(lambda _: "exp_avg"), TypeError, "the state of parameter 0 must be a dict (got str)"),
    (state_of_first(entry_less("step")), ValueError, "'step' is missing in a group or in the state"),
    (state_of_first(entry_less("exp_avg")), ValueError, "'exp_avg' is missing in a group or in the state"),
    (state_of_first(lambda state: {**state, "step": "1"}), TypeError, "state 'step' of parameter 0"),
    (state_of_first(lambda _: {"step": "x"}), ValueError, "'exp_avg' is missing in a group or in the state"),
    (state_of_first(lambda _: {1: 2}), ValueError, "'exp_avg' is missing in a group or in the state"),
]


def ready(**options):
    """Returns an optimizer of two groups after a step, with the gradients of the next one, and what is to be kept."""
    return after_a_step(child_adamw([{"params": [param(), param(7)]}, {"params": [param(5), param(2, 2)]}], **options))


def after_a_step(optimizer):
    train(optimizer, [0])
    set_grads([p for group in optimizer.param_groups for p in group["params"]], 1)
    groups = optimizer.param_groups
    contents = [{**group, "params": list(group["params"])} for group in groups]
    return optimizer, (groups, contents, optimizer.state, {p: dict(state) for p, state in optimizer.state.items()})


def undo(optimizer, kept):
    groups, contents, state, states = kept
    optimizer.param_groups, optimizer.state = groups, state
    for group, content in zip(groups, contents, strict=True):
        group.clear()
        group.update(content)
    state.update(states)


@both_backends
@pytest.mark.parametrize(("change", "error", "words"), ROWS)
def test_a_step_refuses(change, error, words, backend):
    optimizer, kept = ready(backend=backend)
    twin = copy.deepcopy(optimizer)
    set_grads([p for group in twin.param_groups for p in group["params"]], 1)
    before = snapshot(optimizer)
    change(optimizer)
    with pytest.raises(error, match=re.escape(words)) as caught:
        optimizer.step()
    assert type(caught.value) in (TypeError, ValueError)
    assert "\n" not in str(caught.value)
    undo(optimizer, kept)
    assert same_snapshot(before, snapshot(optimizer))
    optimizer.step()
    twin.step()
    assert same_snapshot(snapshot(twin), snapshot(optimizer))


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"amsgrad": True}], ids=["clipped", "amsgrad"])
@pytest.mark.parametrize(("change", "error", "words"), ROWS)
def test_a_step_with_more_in_it_refuses(change, error, words, options):
    optimizer, kept = ready(**options)
    before = snapshot(optimizer)
    change(optimizer)
    with pytest.raises(error, match=re.escape(words)):
        optimizer.step()
    undo(optimizer, kept)
    assert same_snapshot(before, snapshot(optimizer))


@pytest.mark.parametrize(("change", "error", "words"), [row for row in ROWS if "'reserve_p'" not in row[2]])
def test_a_step_of_a_child_network_refuses(change, error, words):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    child = ChildNetwork.random(model, reserve_p=0.5, seed=0, maskable="weight")
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer, kept = after_a_step(child_adamw(groups, child=child))
    before, masks = snapshot(optimizer), optimizer.child_masks
    change(optimizer)
    with pytest.raises((TypeError, ValueError)) as caught:  # another sentence where a child network comes first
        optimizer.step()
    assert "ChildAdamW" in str(caught.value) or re.search(re.escape(words), str(caught.value))
    undo(optimizer, kept)
    assert same_snapshot(before, snapshot(optimizer))
    assert optimizer.child_masks == masks
    optimizer.step()


def test_what_torch_takes_is_taken():
    """No groups, a learning rate below 0 (a schedule's last rounding), integers, and a sequence that is no list."""
    optimizer, kept = ready()
    before = snapshot(optimizer)
    optimizer.param_groups = []
    optimizer.step()
    assert optimizer.seed == 7
    undo(optimizer, kept)
    assert same_snapshot(before, snapshot(optimizer))
    group = optimizer.param_groups[0]
    group.update(lr=-1e-20, weight_decay=0, betas=[0, torch.tensor(0.9)], params=tuple(group["params"]))
    optimizer.param_groups[1]["params"] = torch.nn.ParameterList(optimizer.param_groups[1]["params"])
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_group_twice_is_saved_as_torch_saves_it():
    optimizer, _ = ready()
    optimizer.param_groups.append(optimizer.param_groups[0])
    assert optimizer.state_dict()["param_groups"][2]["params"] == [0, 1]


def test_an_error_of_the_closure_is_left_alone():
    optimizer, _ = ready()
    optimizer.param_groups = None
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(lambda: {}["mine"])


NOT_STEPS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "dense_state_dict": lambda optimizer: optimizer.dense_state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": [param()]}),
    "child_masks": lambda optimizer: optimizer.child_masks,
}


@pytest.mark.parametrize("call", NOT_STEPS.values(), ids=NOT_STEPS)
@pytest.mark.parametrize(
    ("change", "error", "words"), [row for row in ROWS if re.search("param_groups|list of", row[2])]
)
def test_groups_are_looked_at_first(change, error, words, call):
    optimizer, _ = ready()
    change(optimizer)
    with pytest.raises(error, match=re.escape(words)):
        call(optimizer)


CONSTRUCTED = [
    *(
        ({name: x}, TypeError, f"{name} must be a number")
        for name in ("lr", "eps", "weight_decay")
        for x in (None, "x", 1j)
    ),
    *(({"betas": x}, TypeError, "betas must be two numbers in [0, 1)") for x in NOT_TWO),
    ({"betas": ("0.9", 0.9)}, TypeError, "betas[0] must be a number, or a tensor of one (got str '0.9')"),
    ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),  # torch's own sentence
]


@pytest.mark.parametrize(("options", "error", "words"), CONSTRUCTED)
def test_the_constructor_refuses(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ChildAdamW([param()], **options)


GIVEN = [
    (None, TypeError, "params must be parameters or parameter groups (got NoneType)"),
    (5, TypeError, "params must be parameters or parameter groups (got int)"),
    ("x", TypeError, "one of the params is str"),
    ([{}], ValueError, "a parameter group must have 'params' (got an empty dict)"),
    ([{"lr": 1.0}], ValueError, "a parameter group must have 'params' (got 'lr')"),
    ([{"params": None}], TypeError, "must be tensors, or pairs of a name and a tensor (got NoneType)"),
    ([("x",)], TypeError, "a named parameter must be a pair of name and tensor"),
    ([param(dtype=torch.complex64)], TypeError, "(got one of torch.complex64 and shape (4, 3)); freeze it, or hold"),
    ([param().to(torch.float8_e4m3fn).detach().requires_grad_()], TypeError, "(got one of torch.float8_e4m3fn"),
    ([param(1), {"params": []}], TypeError, "one of the params is dict"),
]


@pytest.mark.parametrize(("params", "error", "words"), GIVEN)
def test_parameters_refused(params, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ChildAdamW(params)
    if isinstance(params, list) and isinstance(params[0], dict):
        optimizer, _ = ready()
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(error, match=re.escape(words)):
            optimizer.add_param_group(params[0])
        assert str(optimizer.state_dict()) == str(before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_a_parameter_twice_in_a_group(shape):
    """torch warns, and then steps it twice, or wrongly by its foreach step; kernels would write it from two threads."""
    twice = param(*shape)
    with pytest.raises(ValueError, match=r"in the groups once \(got one of shape .* 2 times\); leave out the others"):
        ChildAdamW([twice, param(), twice])


def test_what_has_no_gradient_may_be_of_any_dtype():
    frozen = [torch.ones(3, dtype=dtype) for dtype in (torch.complex64, torch.int64, torch.bool, torch.float8_e5m2)]
    optimizer = ChildAdamW([param(), *frozen])
    train_one = optimizer.param_groups[0]["params"][0]
    train_one.grad = torch.ones(4, 3)
    optimizer.step()
    assert len(optimizer.state) == 1


def test_the_way_out_that_a_complex_parameter_is_told():
    real = Parameter(torch.view_as_real(torch.ones(3, dtype=torch.complex64)))
    optimizer = ChildAdamW([real], reserve_p=1)
    torch.view_as_complex(real).abs().sum().backward()
    optimizer.step()
    assert torch.all(real[:, 0] < 1)
