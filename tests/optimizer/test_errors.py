"""Bad input: a sentence that says what is wrong, raised before anything is written, from both backends."""

import copy
import re

import pytest
import torch
from helpers import both_backends, child_adamw, make_params, same_snapshot, set_grads, snapshot, train

from childtune_fast import ChildAdamW


def param(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape or (4, 3), dtype=dtype))


OPTIONS = {
    "reserve_p 0": ({"reserve_p": 0}, ValueError, "must lie in (0, 1] (got 0)"),
    "reserve_p NaN": ({"reserve_p": float("nan")}, ValueError, "must lie in (0, 1] (got nan)"),
    "reserve_p above 1": ({"reserve_p": 1.01}, ValueError, "must lie in (0, 1] (got 1.01)"),
    "reserve_p negative": ({"reserve_p": -0.3}, ValueError, "must lie in (0, 1] (got -0.3)"),
    "reserve_p tiny": ({"reserve_p": 1e-9}, ValueError, "at least 1/131072, else no weight is ever updated"),
    "reserve_p text": ({"reserve_p": "0.3"}, TypeError, "must be a float in (0, 1] (got str)"),
    "reserve_p bool": ({"reserve_p": True}, TypeError, "must be a float in (0, 1] (got bool)"),
    "reserve_p None": ({"reserve_p": None}, TypeError, "must be a float in (0, 1] (got NoneType)"),
    "differentiable": ({"differentiable": True}, ValueError, "use torch.optim.AdamW(differentiable=True)"),
    "variant": ({"variant": "adam"}, ValueError, "variant must be 'torch' or 'hf'"),
    "variant with amsgrad": ({"variant": "hf", "amsgrad": True}, ValueError, "use amsgrad=False or variant='torch'"),
    "decay": ({"decay": "some"}, ValueError, "decay must be 'auto', 'all' or 'child' (got 'some')"),
    "max_grad_norm 0": ({"max_grad_norm": 0}, ValueError, "above 0, or None for no clipping (got 0)"),
    "max_grad_norm NaN": ({"max_grad_norm": float("nan")}, ValueError, "(got nan)"),
    "max_grad_norm text": ({"max_grad_norm": "1"}, ValueError, "(got '1')"),
}
CONSTRUCTOR_OPTIONS = {
    "seed fraction": ({"seed": 0.5}, TypeError, "an integer of 64 bits, or None for torch's own (got float)"),
    "seed bool": ({"seed": True}, TypeError, "(got bool)"),
    "seed too large": ({"seed": 1 << 64}, ValueError, "seed must fit in 64 bits (got 18446744073709551616)"),
    "seed too small": ({"seed": -(1 << 63) - 1}, ValueError, "seed must fit in 64 bits"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'native', 'torch' (got 'cuda')"),
    "lr": ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
}
ALL_OPTIONS = {**OPTIONS, **CONSTRUCTOR_OPTIONS}


@pytest.mark.parametrize(("options", "error", "message"), ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_constructor(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ChildAdamW([param()], **options)


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS.values(), ids=OPTIONS)
def test_group_options_given_later(options, error, message):
    """In a group that is added, which then is not there; and written into a group that is there, at the next step."""
    optimizer = child_adamw([param()])
    train(optimizer, [0])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1
    before = snapshot(optimizer)
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    optimizer.param_groups[0].update(kept)
    optimizer.step()


def test_one_seed_for_all_groups():
    with pytest.raises(ValueError, match="seed is one for the whole optimizer"):
        ChildAdamW([{"params": [param()], "seed": 1}, {"params": [param()], "seed": 2}])


def shared_views():
    buffer = torch.ones(10)
    return [torch.nn.Parameter(buffer[:6]), torch.nn.Parameter(buffer[5:])]


def crossing_views():
    buffer = torch.ones(4, 4)
    return [torch.nn.Parameter(buffer[1]), torch.nn.Parameter(buffer[:, 1])]


def reinterpreted():
    buffer = torch.ones(4)
    return [torch.nn.Parameter(buffer), torch.nn.Parameter(buffer.view(torch.bfloat16))]


def negated():
    return [torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat).conj().imag)]


PARAMS = {
    "none": (list, ValueError, "optimizer got an empty parameter list"),
    "non-leaf": (lambda: [param() * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "no tensor": (lambda: [param(), 1.0], TypeError, "can only optimize Tensors, but one of the params is float"),
    "one tensor": (param, TypeError, "should be an iterable of Tensors or dicts, but got"),
    "a set": (lambda: [{"params": {param()}}], TypeError, "organized in ordered collections"),
    "expanded": (lambda: [torch.nn.Parameter(torch.ones(1).expand(3))], ValueError, "must not share memory"),
    "overlapping": (shared_views, ValueError, "must not share memory (got overlapping ones of shapes (6,), (5,))"),
    "crossing": (crossing_views, ValueError, "must not share memory"),
    "of two dtypes": (reinterpreted, ValueError, "must not share memory"),
    "unfolded": (lambda: [torch.nn.Parameter(torch.ones(9).unfold(0, 3, 1))], ValueError, "must not share memory"),
    "lazily negated": (negated, ValueError, "must not be lazily negated views"),
}


@pytest.mark.parametrize(("make", "error", "message"), PARAMS.values(), ids=PARAMS)
def test_parameters(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ChildAdamW(make())


def test_overlap_across_groups():
    first, second = shared_views()
    optimizer = ChildAdamW([first])
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1


def sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


def of_dtype(dtype):
    def change(p):
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)

    return change


def gradient_of_dtype(p):
    p.grad = torch.ones_like(p)
    p.grad.data = p.grad.data.double()


def gradient_of_shape(p):
    p.grad = torch.ones_like(p)
    p.data = torch.ones(2, 2)


def without_memory(p):
    p.grad = torch.ones_like(p)
    p.data.untyped_storage().resize_(0)


BAD_GRADIENTS = {
    "sparse": (sparse, RuntimeError, "does not support sparse gradients, please consider SparseAdam instead"),
    "complex": (
        of_dtype(torch.complex64),
        TypeError,
        "hold a complex one as torch.nn.Parameter(torch.view_as_real(x))",
    ),
    "integers": (of_dtype(torch.int32), TypeError, "must be float32, float64, bfloat16 or float16 (got torch.int32"),
    "float8": (of_dtype(torch.float8_e4m3fn), TypeError, "(got torch.float8_e4m3fn for parameter 1 of shape (4, 3))"),
    "another dtype": (gradient_of_dtype, TypeError, "the gradient of parameter 1 of shape (4, 3) must be"),
    "another shape": (gradient_of_shape, ValueError, "must have the shape (2, 2) (got (4, 3))"),
    "freed memory": (without_memory, ValueError, "its storage was freed or shrunk"),
}


class Elsewhere(torch.nn.Parameter):
    """torch refuses to assign a gradient on another device; extensions can still end up with one."""

    grad = property(lambda self: torch.ones(self.shape, device="meta"), lambda self, value: None)


@both_backends
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "amsgrad": True}], ids=["plain", "clipped"])
@pytest.mark.parametrize(("spoil", "error", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_gradients(spoil, error, message, options, backend):
    """The bad one is the second of three: neither the others nor any state are touched, and none is begun."""
    good, bad, last = param(), torch.ones(4, 3), param(129)
    optimizer = child_adamw([good, bad, last], backend=backend, **options)
    good.grad, last.grad = torch.ones(4, 3), torch.ones(129)
    spoil(bad)
    assert_refused(optimizer, [good, last], error, message)
    bad.grad = None
    optimizer.step()  # the others go on
    assert {len(state) for state in optimizer.state.values()} == {4 if options else 3}


@both_backends
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_gradient_on_another_device(options, backend):
    good, bad = param(), Elsewhere(torch.ones(4, 3))
    good.grad = torch.ones(4, 3)
    optimizer = child_adamw([good, bad], backend=backend, **options)
    assert_refused(optimizer, [good, bad], ValueError, "must be on the parameter's device cpu (got meta)")


def assert_refused(optimizer, params, error, message):
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert len(optimizer.state) == 0
    assert all(torch.equal(p, torch.ones(p.shape)) for p in params)


BAD_STATES = {
    "exp_avg": ["x", None, torch.zeros(5), torch.zeros(5, 3).double(), torch.zeros(5, 3, device="meta"), 1.0],
    "exp_avg_sq": [[0.0], torch.zeros(3, 5), torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 3).to_sparse()],
    "max_exp_avg_sq": [(), torch.zeros(()), torch.zeros(5, 3).to(torch.bfloat16)],
    "step": [1, None, "1", *(torch.tensor(x) for x in (1, -1.0, 0.5, float("nan"), float("inf"), 2.0**32, [1.0, 2.0]))],
}


@both_backends
@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_STATES.items() for v in values], ids=lambda x: str(x)[:40]
)
def test_spoilt_state(key, value, backend):
    params = make_params()
    optimizer = child_adamw(params, amsgrad=True, backend=backend)
    set_grads(params, 0)
    params[2].grad = None  # its state has not begun
    optimizer.step()
    set_grads(params, 1)
    optimizer.state[params[0]][key] = value
    before = snapshot(optimizer)
    message = f"ChildAdamW: state '{key}' of parameter 0 of shape (5, 3) must be"
    with pytest.raises((TypeError, ValueError), match=re.escape(message).replace("be", "(be|have)")):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    assert params[2] not in optimizer.state


@both_backends
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_missing_state(key, backend):
    params = make_params()
    optimizer = child_adamw(params, backend=backend)
    train(optimizer, [0])
    optimizer.param_groups[0]["amsgrad"] = True  # begins an entry, which the error takes back
    del optimizer.state[params[3]][key]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"'{key}' is missing in a group or in the state of a parameter"):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))


@both_backends
def test_a_step_count_stops_where_its_dtype_does(backend):
    """A float32 cannot count from 2^24 to 2^24 + 1, and F would draw one mask for ever."""
    params = make_params()
    optimizer = child_adamw(params, backend=backend)
    train(optimizer, [0])
    last = torch.tensor(2.0**24 - 1)
    for param in params:
        optimizer.state[param]["step"] = last.clone()
    train(optimizer, [1])
    assert all(optimizer.state[param]["step"] == 2**24 for param in params)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"below 2\*\*24, as far as float32 counts, or a float64 tensor to go on \(got 16"
    ):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    for param in params:
        optimizer.state[param]["step"] = optimizer.state[param]["step"].double()
    train(optimizer, [2])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [3])
    assert all(optimizer.state[param]["step"] == 2**24 + 2 for param in params)
