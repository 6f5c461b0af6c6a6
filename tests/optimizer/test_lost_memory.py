"""What would read memory that a tensor has lost is refused: torch crashes there. And subclasses."""

import pytest
import torch
from helpers import both_backends, same_bits, same_snapshot, snapshot
from test_step_memory import assert_refused, begun
from torch.testing._internal.two_tensor import TwoTensor

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.integrations.config import ChildTuningConfig


def freed(tensor):
    """The tensor, after its storage was freed: torch crashes when it prints it, or computes with it."""
    tensor.untyped_storage().resize_(0)
    return tensor


@both_backends
def test_a_lazily_negated_gradient_without_memory(backend):
    optimizer, params = begun(backend)
    grad, params[1].grad = params[1].grad, freed(torch._neg_view(torch.ones(8, 8)))
    assert params[1].grad.is_neg()

    def undo():
        params[1].grad = grad

    assert_refused(optimizer, "the gradient of parameter 1 .* has no memory any more", undo)


@both_backends
def test_a_step_count_that_holds_such_a_tensor(backend):
    optimizer, params = begun(backend)
    state = optimizer.state[params[1]]
    state["step"] = [freed(torch.ones(3))]
    with pytest.raises(TypeError, match=r"state 'step' of parameter 1 .* must be a tensor .* \(got list\)"):
        optimizer.step()


def test_arguments_that_are_such_tensors():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"backend must be one of .* \(got a tensor of shape \(3,\), torch.float32\)"):
        ChildAdamW([param], backend=freed(torch.ones(3)))
    for name, value in (("decay", "all"), ("grad_clip", 1.0), ("train_mode", False)):
        with pytest.raises((TypeError, ValueError), match=r"\(got a tensor of shape \(3,\), torch.float32\)"):
            ChildTuningConfig(mode="D", **{name: freed(torch.full((3,), float("nan")))})
        ChildTuningConfig(mode="D", **{name: value})


def test_a_state_of_no_elements_that_torch_does_not_write():
    """torch refuses to write tensors of zeros that it has not made, though there be nothing to write."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 0)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ChildAdamW(params, backend="torch")
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch._efficientzerotensor(0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 1 .* has no memory"):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))


@both_backends
def test_a_parameter_in_two_groups_leaves_no_state(backend):
    """Of which the second would extend what the first has begun."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ChildAdamW([{"params": [param]}, {"params": [], "amsgrad": True}], backend=backend)
    optimizer.param_groups[1]["params"].append(param)
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="every parameter must be in the groups once"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_a_lazily_negated_state_is_refused_by_a_step_in_torch(name):
    optimizer, params = begun("torch")
    state = optimizer.state[params[1]]
    value = state[name]
    state[name] = torch._neg_view(-value)
    assert_refused(optimizer, f"state '{name}' of parameter 1 .* lazily negated", lambda: state.update({name: value}))


# ---- Subclasses ----------------------------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass with memory of its own."""


@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_a_checkpoint_with_a_subclass_without_memory(key):
    optimizer, _ = begun("native")
    checkpoint = optimizer.state_dict()
    value = checkpoint["state"][1][key]
    checkpoint["state"][1] = {**checkpoint["state"][1], key: freed(value.clone().as_subclass(Named))}
    with pytest.raises(ValueError, match=f"load_state_dict: '{key}' must have memory for its values"):
        optimizer.load_state_dict(checkpoint)


def test_arguments_of_a_subclass_without_memory():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="lr must be a number, or a tensor of one"):
        ChildAdamW([param], lr=freed(torch.tensor(0.1).as_subclass(Named)))
    model = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(ValueError, match="masks must have memory for their values"):
        ChildNetwork.from_masks(model, {"weight": freed(torch.ones(3, 3, dtype=torch.bool).as_subclass(Named))})


def test_numbers_of_a_checkpoint_without_memory():
    optimizer, _ = begun("native")
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["betas"] = (0.9, freed(torch.tensor(0.99)))
    with pytest.raises(ValueError, match="load_state_dict: 'betas' must have memory for its values"):
        optimizer.load_state_dict(checkpoint)


@both_backends
def test_a_class_that_computes_in_its_own_way_is_refused(backend):
    """It has no memory of its own, and what torch's operations do to it is for its class to say."""
    wrapped = torch.nn.Parameter(TwoTensor(torch.full((3,), 1.0), torch.full((3,), 2.0)))
    optimizer = ChildAdamW([wrapped], backend=backend)
    wrapped.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"the value of parameter 0 .* plain tensor or a DTensor \(got TwoTensor"):
        optimizer.step()
    assert wrapped.a.tolist() == [1, 1, 1]
    assert not optimizer.state


@both_backends
def test_a_step_in_inference_mode(backend):
    """Whose tensors count no writes."""
    steps = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            param = torch.nn.Parameter(torch.ones(3))
            param.grad = torch.ones(3)
            optimizer = ChildAdamW([param], backend=backend, seed=1)
            optimizer.step()
            optimizer.step()
            steps.append(param.detach().clone())
    assert same_bits(*steps)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_state_that_torch_cannot_write_is_refused_before_anything_is_written(state):
    params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]
    optimizer = ChildAdamW(params, backend="torch", state=state)
    with torch.inference_mode():
        params[1].grad = torch.ones(5000)
        optimizer.step()
    params[0].grad, params[1].grad = torch.ones(5000), torch.ones(5000)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"made in torch.inference_mode\(\)"):
        optimizer.step()
    assert same_snapshot(snapshot(optimizer), before)
