"""torch's own tests of AdamW, demanded of ChildAdamW: training goes the right way, with AdamW's results."""

import copy

import pytest
import torch
from helpers import both_backends, every_dtype, make_params, same_bits, same_snapshot, set_grads, snapshot
from torch_suite import INFO, Regression, assert_close, every_input, every_kind, every_loop, make, options_of

SCHEDULES = [(), *INFO.scheduler_inputs]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=["constant", *map(str, range(1, len(SCHEDULES)))])


# ---- The loss goes the right way -----------------------------------------------------------------------------------


@every_loop
@every_kind
@both_backends
@every_schedule
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(name, kind, backend, schedule, contiguous):
    options, model = options_of(name), Regression(contiguous)
    assert model.weight.is_contiguous() == model.bias.is_contiguous() == contiguous
    optimizer = make(kind, model, backend, **options)
    schedulers = [scheduler(optimizer) for scheduler in schedule]
    assert model.train_with(optimizer, 11, schedulers) != options.get("maximize", False)


@every_kind
@both_backends
@every_schedule
def test_param_group_with_lrscheduler_goes_right_direction(kind, backend, schedule):
    model = Regression()
    optimizer = make(kind, model, backend, [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}])
    assert model.train_with(optimizer, 20, [scheduler(optimizer) for scheduler in schedule])
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[1] == pytest.approx(10 * rates[0])  # both follow the schedule
    assert (rates[0] < 1e-3) == bool(schedule)


def groups_of(model, options):
    return [{"params": [model.weight], **options}, {"params": [model.bias], **options, "weight_decay": 0.0}]


@every_input
@every_kind
@both_backends
def test_param_groups_weight_decay(name, kind, backend):
    options, ours, theirs = options_of(name), Regression(), Regression()
    assert ours.train_with(make(kind, ours, backend, groups_of(ours, options)), 8) != options.get("maximize", False)
    if kind == "plain":
        theirs.train_with(torch.optim.AdamW(groups_of(theirs, options)), 8)
        assert_close(ours.parameters(), theirs.parameters(), 8)


@every_input
@every_kind
@both_backends
def test_param_groups_lr(name, kind, backend):
    """A group with a learning rate of almost 0 stays where it is, whatever the other one does."""
    options, model = {"lr": 1e-3, **options_of(name)}, Regression()
    model.irrelevant = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [model.weight, model.bias], **options}, {"params": [model.irrelevant]}]
    optimizer = make(kind, model, backend, groups, lr=1e-28)
    optimizer.register_step_pre_hook(lambda *_: set_grads([model.irrelevant], 0))
    assert model.train_with(optimizer, 8) != options.get("maximize", False)
    assert optimizer.state[model.irrelevant]["step"] == 8
    assert same_bits(model.irrelevant, torch.ones(2))


# ---- Equal results -------------------------------------------------------------------------------------------------


@every_loop
@every_kind
@both_backends
@pytest.mark.parametrize("dimensions", range(3))
def test_tensor_lr(name, kind, backend, dimensions):
    options = {**options_of(name), "foreach": None}  # AdamW refuses it with a tensor
    number, tensor, theirs = Regression(), Regression(), Regression()
    lr = torch.tensor(2e-3, dtype=torch.float64).reshape([1] * dimensions)
    number.train_with(make(kind, number, backend, **{**options, "lr": 2e-3}), 5)
    tensor.train_with(make(kind, tensor, backend, **{**options, "lr": lr}), 5)
    assert all(map(same_bits, number.parameters(), tensor.parameters()))
    if kind == "plain":
        theirs.train_with(torch.optim.AdamW(theirs.parameters(), **{**options, "lr": lr}), 5)
        assert_close(tensor.parameters(), theirs.parameters(), 5)


def trained(dtype, make_optimizer):
    """What parameters and state are after each of 7 steps: one without gradients, two with a layer frozen."""
    layers = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)]
    model = torch.nn.Sequential(layers[0], torch.nn.Sigmoid(), layers[1], torch.nn.Sigmoid()).to(dtype)
    model.scalar = torch.nn.Parameter(torch.ones((), dtype=dtype))
    values = make_params([p.shape for p in model.parameters()], dtype)
    for p, value in zip(model.parameters(), values, strict=True):
        p.data.copy_(value)
    optimizer, seen = make_optimizer(model), []
    for step in range(7):
        optimizer.zero_grad()
        layers[1].requires_grad_(step not in (3, 4))
        if step != 2:
            model(torch.arange(1, 7, dtype=dtype).reshape(3, 2) / 10).sum().backward()
            model.scalar.grad = torch.ones_like(model.scalar)
        optimizer.step()
        seen.append(snapshot(optimizer))
    return seen


def assert_same_steps(ours, theirs):
    """Asserts that what `trained` returns for a ChildAdamW is, up to roundings, what it returns for an AdamW."""
    for steps, ((params, states), (their_params, their_states)) in enumerate(zip(ours, theirs, strict=True), 1):
        assert_close([p for p, _ in params], [p for p, _ in their_params], steps)
        for state, their_state in zip(states, their_states, strict=True):
            assert list(state) == list(their_state)
            assert state["step"] == their_state["step"]
            assert_close(list(state.values())[1:], list(their_state.values())[1:], steps)


def forloop(options):
    """What makes an AdamW that loops over the parameters; with numbers for tensors, in whose dtype it would compute."""
    options = {**options, "foreach": False, "fused": False, "lr": float(options.get("lr", 1e-3))}
    options["betas"] = tuple(map(float, options.get("betas", (0.9, 0.999))))
    return lambda model: torch.optim.AdamW(model.parameters(), **options)


@every_loop
@both_backends
@every_dtype
def test_fused_matches_forloop(name, backend, dtype):
    options = options_of(name)
    if dtype == torch.float16:
        options["eps"] = 0.1  # as torch's list has it: 1e-8 is 0 there
    ours = trained(dtype, lambda model: make("plain", model, backend, **options))
    assert_same_steps(ours, trained(dtype, forloop(options)))


@every_loop
@every_kind
@both_backends
def test_foreach_matches_forloop(name, kind, backend):
    """Here neither decides what is computed: the bits are the same."""
    options = options_of(name)
    loop = trained(torch.float64, lambda model: make(kind, model, backend, **options))
    for flag in {"fused", "foreach"} - ({"foreach"} if "lr" in options and torch.is_tensor(options["lr"]) else set()):
        ours = trained(torch.float64, lambda model, flag=flag: make(kind, model, backend, **{**options, flag: True}))
        assert all(map(same_snapshot, ours, loop))


@every_loop
@both_backends
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_set_default_dtype_works_with_foreach(name, backend, default):
    """The step count stays a float32, where AdamW's is a float64 with the other default."""
    options, before = options_of(name), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        ours = trained(torch.float64, lambda model: make("plain", model, backend, **options))
        theirs = trained(torch.float64, forloop(options))
    finally:
        torch.set_default_dtype(before)
    assert_same_steps(ours, theirs)
    assert {state["step"].dtype for _, states in ours for state in states} == {torch.float32}


@every_loop
@both_backends
def test_mixed_device_dtype(name, backend):
    """Parameters of all dtypes in one group. The devices are the CPU alone."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    ours, theirs = (torch.nn.ParameterList(make_params([(2, 3)], dtype)[0] for dtype in dtypes) for _ in range(2))
    options = {**options_of(name), "eps": 0.1}
    optimizers = [make("plain", ours, backend, **options), forloop(options)(theirs)]
    for step in range(7):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    assert_close(ours, theirs, 7)


@every_loop
@both_backends
def test_complex(name, backend):
    """Complex parameters are refused; their real views, as the error says, are stepped as AdamW steps them."""
    parts = torch.nn.ParameterList(make_params(((10, 5, 2), (10, 2))))
    whole = torch.nn.ParameterList(torch.view_as_complex(p.detach().clone()) for p in parts)
    options = options_of(name)
    with pytest.raises(TypeError, match=r"torch\.nn\.Parameter\(torch\.view_as_real\(x\)\)"):
        make("plain", whole, backend, **options)
    ours, theirs = make("plain", parts, backend, **options), forloop(options)(whole)
    for step in range(3):
        set_grads(parts, step)
        for p, q in zip(whole, parts, strict=True):
            p.grad = torch.view_as_complex(q.grad.clone())
        ours.step()
        theirs.step()
    assert_close(parts, map(torch.view_as_real, whole), 3)


def rosenbrock(point):
    x, y = point
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()


@every_loop
@both_backends
def test_complex_2d(name, backend):
    """Real and imaginary part as parameters of their own are stepped as AdamW steps the complex one."""
    parts = torch.nn.ParameterList(make_params(((2,), (2,))))
    whole = torch.nn.ParameterList([torch.complex(*(p.detach() for p in parts))])
    options = options_of(name)
    ours, theirs = make("plain", parts, backend, **options), forloop(options)(whole)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        rosenbrock(torch.complex(*parts)).backward()
        rosenbrock(whole[0]).backward()
        ours.step()
        theirs.step()
    assert_close(parts, (whole[0].real, whole[0].imag), 3)


# ---- What a step leaves alone --------------------------------------------------------------------------------------


@every_input
@every_kind
@both_backends
def test_step_is_noop_when_params_have_no_grad(name, kind, backend):
    model = Regression().requires_grad_(False)
    before = copy.deepcopy(list(model.parameters()))
    optimizer = make(kind, model, backend, **options_of(name))
    assert optimizer.step(lambda: 5) == 5
    assert all(map(same_bits, model.parameters(), before))
    assert len(optimizer.state) == 0


@every_input
@every_kind
@both_backends
def test_step_is_noop_for_zero_grads(name, kind, backend):
    """Without weight decay, which moves them."""
    model = Regression()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = make(kind, model, backend, **{**options_of(name), "weight_decay": 0})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(lambda: 5) == 5
    assert all(map(same_bits, model.parameters(), before))
    assert all(optimizer.state[p]["step"] == 1 for p in model.parameters())


@every_input
@every_kind
@both_backends
@pytest.mark.parametrize("scale", [None, 1.0], ids=["no scale", "scale"])
def test_fused_does_not_step_if_foundinf(name, kind, backend, scale):
    """torch demands it on a GPU, and the step count 0 of a parameter that has one."""
    model = Regression()
    optimizer = make(kind, model, backend, **options_of(name))
    model().backward()
    before = snapshot(optimizer)
    optimizer.grad_scale = None if scale is None else torch.full((1,), scale)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    assert len(optimizer.state) == 0


@every_input
@every_kind
@both_backends
def test_grads_are_never_inplaced_into(name, kind, backend):
    model = Regression()
    optimizer = make(kind, model, backend, **options_of(name))
    model().backward()
    grads = [(p.grad, p.grad._version, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (grad, version, before) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert grad._version == version
        assert same_bits(grad, before)
