"""The compiled reader of parameters and states reads what Python would, and leaves to it what is unusual."""

import gc
from collections import OrderedDict, defaultdict

import pytest
import torch
from child_models import Model, params_of
from child_models import child_adamw as with_child
from helpers import child_adamw, make_params, set_grads, train
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from childtune_fast.native import load
from childtune_fast.ops.step import StepKernels
from childtune_fast.ops.step_group import StepGroup
from childtune_fast.optimizer.collect import collect

LISTS = [name for name, field in StepGroup.__dataclass_fields__.items() if "list" in str(field.type)]


@pytest.fixture(scope="module")
def native():
    return load.load_native()


def collected(optimizer):
    """What a step of the optimizer is of: the entries of all lists, tensors by their identity."""
    masks = optimizer._masks() if optimizer._book.active else None
    groups = collect(optimizer.param_groups, optimizer.state, masks, StepKernels.find("native"), {})["cpu"]
    entries = [{name: getattr(group, name) for name in LISTS} for group in groups]
    return [{k: list(map(key, v or ())) for k, v in of_group.items()} for of_group in entries]


def key(entry):
    return id(entry) if isinstance(entry, torch.Tensor) else entry


def in_another_order(optimizer):
    states = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update(states[::-1])


def without_some_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"][::3]:
            param.grad = None


def with_one_that_begins(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def with_strangers_in_the_state(optimizer):
    optimizer.state[torch.ones(1)] = {}
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param] = optimizer.state.pop(param)


def with_new_states(optimizer):
    for state in list(optimizer.state.values()):
        state.update({name: value.clone() for name, value in state.items()})


CHANGES = [in_another_order, without_some_gradients, with_one_that_begins, with_strangers_in_the_state, with_new_states]


def in_groups(**options):
    params = make_params()
    return child_adamw([{"params": params[:2]}, {"params": params[2:], **options}], backend="native")


OPTIMIZERS = {
    "F": lambda: in_groups(),
    "amsgrad": lambda: in_groups(amsgrad=True),
    "D": lambda: with_child(Model(), backend="native"),
}


@pytest.mark.parametrize("change", [lambda _: None, *CHANGES], ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_reads_what_python_reads(make, change, monkeypatch):
    optimizer = make()
    set_grads([param for group in optimizer.param_groups for param in group["params"]], 0)
    optimizer.step()
    change(optimizer)
    found = collected(optimizer)
    monkeypatch.setattr(StepKernels, "state_reader", lambda *_: None)
    assert found == collected(optimizer)


def stepped():
    optimizer = child_adamw(make_params(), backend="native")
    train(optimizer, [0])
    return optimizer


class Another(Parameter):
    """Might read its gradient in another way."""


def unusual(optimizer):
    """{what: (parameters, states, masks)}, each with one thing that the reader must leave to Python."""
    params, states = optimizer.param_groups[0]["params"], optimizer.state
    first = params[0]
    another = Another(first.detach())
    another.grad = first.grad
    negated = Parameter(first.detach())
    negated.grad = torch.complex(first.grad, first.grad).conj().imag
    no_average = {name: value for name, value in states[first].items() if name != "exp_avg"}
    return {
        "a tuple of parameters": (tuple(params), states, None),
        "no tensor": ([*params, 1], states, None),
        "a subclass": ([another], defaultdict(dict, {another: states[first]}), None),
        "a negated gradient": ([negated], defaultdict(dict, {negated: states[first]}), None),
        "another device": ([Parameter(torch.ones(3, device="meta")), *params], states, None),
        "no state": (params, defaultdict(dict), None),
        "no average": (params, defaultdict(dict, {**states, first: no_average}), None),
        "a state of another class": (params, {**states, first: OrderedDict(states[first])}, None),
        "states of another class": (params, OrderedDict(states), None),
        "masks of another class": (params, states, OrderedDict()),
    }


@pytest.mark.parametrize("what", unusual(stepped()))
def test_what_is_unusual_is_left_to_python(native, what):
    optimizer = stepped()
    params, states, masks = unusual(optimizer)[what]
    assert native.StateReader(states, masks).read(params, 0, False) is None
    assert native.StateReader(optimizer.state, None).read(optimizer.param_groups[0]["params"], 0, False) is not None
    assert native.StateReader(optimizer.state, None).read(optimizer.param_groups[0]["params"], 0, True) is None


class Taking(TorchFunctionMode):
    """Takes away what is being read, as soon as Python code runs."""

    def __init__(self, *things):
        super().__init__()
        self.things = things

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for thing in self.things:
            thing.clear()
        gc.collect()
        return function(*args, **(kwargs or {}))


def test_code_that_runs_meanwhile_takes_nothing_away(native):
    optimizer = stepped()
    params, states = optimizer.param_groups[0]["params"], optimizer.state
    reader = native.StateReader(states, {params[0]: object()})
    with Taking(params, states, *states.values()):
        read = reader.read(params, 0, False)
    assert (params, dict(states), read) == ([], {}, None)


def test_a_hash_that_raises_is_told(native, monkeypatch):
    optimizer = stepped()
    in_another_order(optimizer)
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        native.StateReader(optimizer.state, None).read(optimizer.param_groups[0]["params"], 0, False)


def params_with_masks(optimizer):
    masks = optimizer._masks()
    return [param for param in params_of(optimizer) if param in masks]


def test_a_masked_parameter_of_another_shape_is_still_refused():
    optimizer = with_child(Model(), backend="native")
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    param = params_with_masks(optimizer)[0]
    param.data, param.grad = param.data.flatten()[:5].clone(), torch.ones(5)
    with pytest.raises(ValueError, match="must keep its shape"):
        optimizer.step()


@pytest.mark.parametrize("forced", [False, True], ids=["library", "Python"])
def test_writes_are_counted_once_whoever_reads(native, forced):
    optimizer = stepped()
    native.force_attribute_access(forced)
    train(optimizer, [1, 2])
    native.force_attribute_access(False)
    written = [(param, *state.values()) for param, state in optimizer.state.items() if param.numel() > 0]
    assert {t._version for tensors in written for t in tensors if t.dim() > 0} == {3}


@pytest.mark.parametrize("forced", [False, True], ids=["library", "Python"])
def test_what_has_no_count_is_stepped_too(native, forced):
    with torch.inference_mode():
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = child_adamw([param], backend="native")
        native.force_attribute_access(forced)
        optimizer.step()
        optimizer.step()
        native.force_attribute_access(False)
        assert optimizer.state[param]["step"] == 2
