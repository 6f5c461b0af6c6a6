"""A step writes only to memory that its tensors have, and to no place twice; whatever else it is given, it refuses."""

import pytest
import torch
from helpers import both_backends, same_snapshot, snapshot

from childtune_fast import ChildAdamW


def begun(backend, shape=(8, 8), **options):
    """An optimizer of two parameters, views of one buffer, after a step."""
    buffer = torch.ones(2 * 64 + 16)
    params = [torch.nn.Parameter(buffer[start : start + 64].view(shape)) for start in (16, 80)]
    optimizer = ChildAdamW(params, backend=backend, seed=7, **options)
    for param in params:
        param.grad = torch.full(shape, 0.5)
    optimizer.step()
    return optimizer, params


def assert_refused(optimizer, message, undo):
    """Asserts that a step raises and writes nothing, twice, and that one is taken after `undo`."""
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    undo()
    before = snapshot(optimizer)
    optimizer.step()
    assert not same_snapshot(before, snapshot(optimizer))
    assert all(state["step"] == 2 for state in optimizer.state.values())


# ---- Memory that was freed or shrunk -------------------------------------------------------------------------------


def in_a_buffer(tensor):
    """A copy at the end of a buffer of its own, as flattened parameters and their gradients lie in one."""
    return torch.cat([torch.zeros(1000, dtype=tensor.dtype), tensor.flatten()])[1000:].view(tensor.shape)


PLACES = {
    "parameter": lambda optimizer, param: param,
    "gradient": lambda optimizer, param: param.grad,
    "exp_avg": lambda optimizer, param: optimizer.state[param]["exp_avg"],
    "exp_avg_sq": lambda optimizer, param: optimizer.state[param]["exp_avg_sq"],
    "step": lambda optimizer, param: optimizer.state[param]["step"],
}


@both_backends
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("size", ["none", "the view's begin", "a byte less"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_view_into_a_storage_that_was_freed_or_shrunk(place, size, options, backend):
    optimizer, params = begun(backend, **options)
    tensor = place(optimizer, params[1])
    with torch.no_grad():
        tensor.data = in_a_buffer(tensor.detach())
    storage, values = tensor.untyped_storage(), tensor.detach().clone()
    whole = storage.nbytes()
    storage.resize_({"none": 0, "the view's begin": 4000, "a byte less": whole - 1}[size])
    before = [param.clone() for param in params if param is not tensor]

    def undo():
        assert all(map(torch.equal, before, (param for param in params if param is not tensor)))
        storage.resize_(whole)
        with torch.no_grad():
            tensor.copy_(values)

    assert_refused(optimizer, r"of parameter 1 of shape \(8, 8\) has no memory any more, or not enough", undo)


@both_backends
def test_masks_without_memory(backend):
    from childtune_fast import ChildNetwork

    model = torch.nn.Linear(8, 8)
    child = ChildNetwork.random(model, reserve_p=0.5, seed=0, maskable="weight")
    optimizer = ChildAdamW(model.parameters(), child=child, backend=backend)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    before = model.weight.clone()
    bits = optimizer.child_masks[model.weight].bits
    bits.data = bits.clone()  # in a storage that can be resized
    bits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"the mask of parameter 0 of shape .* has no memory any more"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_an_optimizer_of_parameters_whose_memory_is_freed_for_now():
    """They have no place in memory that another one could share."""
    buffer = torch.ones(8)
    params = [torch.nn.Parameter(buffer[:4]), torch.nn.Parameter(buffer[4:]), torch.nn.Parameter(torch.ones(4))]
    buffer.untyped_storage().resize_(0)
    optimizer = ChildAdamW(params, backend="native")
    buffer.untyped_storage().resize_(32)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


# ---- Memory that is shared -----------------------------------------------------------------------------------------


def expanded(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(()).expand(8, 8)


def one_average(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg_sq"]


def the_parameter(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = params[0].detach()


def one_state(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"]


def one_count(optimizer, params):
    optimizer.state[params[0]]["step"] = optimizer.state[params[1]]["step"]


def expanded_parameter(optimizer, params):
    params[0].data = params[0].data[:1, :1].expand(8, 8)


def shifted_parameter(optimizer, params):
    params[0].data = torch.as_strided(params[1].data, (8, 8), (8, 1), params[1].storage_offset() - 1)


def overlapping_windows(optimizer, params):
    optimizer.state[params[0]]["exp_avg_sq"] = torch.zeros(64).as_strided((8, 8), (4, 1))


SHARED = (
    *(expanded, one_average, the_parameter, one_state, one_count),
    *(expanded_parameter, shifted_parameter, overlapping_windows),
)


@both_backends
@pytest.mark.parametrize("share", SHARED, ids=lambda function: function.__name__)
def test_memory_that_is_written_twice(share, backend):
    optimizer, params = begun(backend)
    states, data = [dict(optimizer.state[param]) for param in params], [param.data for param in params]
    share(optimizer, params)
    before = [param.clone() for param in params]

    def undo():
        assert all(map(torch.equal, before, params))
        for param, state, values in zip(params, states, data, strict=True):
            optimizer.state[param].update(state)
            param.data = values

    assert_refused(optimizer, "the parameters and the state that a step writes must not share memory", undo)


@both_backends
def test_views_that_interleave_without_sharing_pass(backend):
    optimizer, params = begun(backend)
    buffer = torch.zeros(8, 16)
    with torch.no_grad():
        for param, part in zip(params, (buffer[:, ::2], buffer[:, 1::2]), strict=True):
            part.copy_(param)
            param.data = part
    expected, others = begun(backend)
    for each in (optimizer, optimizer, expected, expected):
        each.step()
    assert all(map(torch.equal, params, others))


def test_a_step_looks_again_only_where_memory_has_changed(monkeypatch):
    looked = []
    monkeypatch.setattr("childtune_fast.ops.step.check_apart", lambda tensors, what: looked.append(len(list(tensors))))
    optimizer, params = begun("torch")
    optimizer.step()
    assert looked == [8]
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert looked == [8, 8]


def test_another_shape_over_the_same_memory_is_looked_at_again():
    """As many elements with the same strides may overlap in another shape."""
    param = torch.nn.Parameter(torch.arange(8.0).reshape(4, 2).t())
    optimizer = ChildAdamW([param], backend="native", reserve_p=1)
    param.grad = torch.ones(2, 4)
    optimizer.step()
    param.data = param.data.as_strided((4, 2), (1, 2))
    param.grad = torch.ones(4, 2)
    state = optimizer.state[param]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key].as_strided((4, 2), (1, 2))
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.step()


def test_a_longer_view_of_the_same_memory_is_looked_at_again():
    buffer = torch.ones(8)
    a, b = (torch.nn.Parameter(part) for part in buffer.split(4))
    optimizer = ChildAdamW([a, b], backend="torch")
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    state = optimizer.state[a]
    for key in ("exp_avg", "exp_avg_sq"):
        whole = torch.empty(0).set_(state[key].untyped_storage(), 0, (4,))
        whole.resize_(6)
        state[key] = whole
    a.data, a.grad = buffer[:6], torch.ones(6)
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.step()


@both_backends
def test_step_counts_that_overlap(backend):
    optimizer, (a, b) = begun(backend)
    counts = torch.zeros(4)
    wide, narrow = counts[:2].view(torch.float64)[0], counts[1]
    before = optimizer.state[a]["step"], optimizer.state[b]["step"]
    optimizer.state[a]["step"], optimizer.state[b]["step"] = wide, narrow

    def undo():
        optimizer.state[a]["step"], optimizer.state[b]["step"] = before

    assert_refused(optimizer, "must not share memory", undo)


def test_frozen_parameters_may_share_memory():
    """No step writes them; one that is made trainable is looked at when it has a gradient."""
    values = torch.ones(4)
    frozen = [torch.nn.Parameter(values, requires_grad=False) for _ in range(2)]
    frozen.append(torch.nn.Parameter(torch.zeros(1).expand(4), requires_grad=False))
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = ChildAdamW([param, *frozen])
    param.grad = torch.ones(4)
    optimizer.step()
    for twin in frozen[:2]:
        twin.requires_grad_()
        twin.grad = torch.ones(4)
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.step()
