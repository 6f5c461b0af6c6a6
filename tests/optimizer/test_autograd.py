"""ChildAdamW among the rest of torch: version counters, random states, memory, frozen and cast models, dynamo."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_run,
    both_backends,
    child_adamw,
    every_dtype,
    make_params,
    raw,
    same_bits,
    set_grads,
    train,
)
from torch.profiler import ProfilerActivity, profile

from childtune_fast import ChildAdamW


def small_model(dropout=0.0):
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(13, 3)
    )


def train_model(model, optimizer, steps=3, dtype=torch.float32):
    x = torch.linspace(-1, 1, 35).view(5, 7).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@both_backends
def test_autograd_notices_a_step_between_forward_and_backward(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = child_adamw([p], backend=backend)
    p.grad = torch.ones(3)
    loss = p.square().sum()  # saves p
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_backends
def test_versions_of_all_that_is_written_and_of_nothing_else(backend):
    params = make_params()
    optimizer = child_adamw(params, amsgrad=True, backend=backend)
    train(optimizer, [0])
    written = params + [v for p in params for k, v in optimizer.state[p].items() if k != "step"]
    written = [tensor for tensor in written if tensor.numel() > 0]
    before, grads_before = [t._version for t in written], [p.grad._version for p in params]
    optimizer.step()
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    params[0].grad = None
    before_skip = params[0]._version
    optimizer.step()
    assert params[0]._version == before_skip
    assert [p.grad._version for p in params[1:]] == grads_before[1:]


@both_backends
@every_dtype
@pytest.mark.parametrize("options", [{}, {"maximize": True, "max_grad_norm": 0.1}, {"reserve_p": 1.0}], ids=str)
def test_the_gradient_is_not_written(options, dtype, backend):
    params = make_params(dtype=dtype)
    set_grads(params, 0)
    before = [raw(p.grad) for p in params]
    child_adamw(params, backend=backend, **options).step()
    assert all(torch.equal(raw(p.grad), b) for p, b in zip(params, before, strict=True))


@both_backends
def test_random_states_are_untouched(backend):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is what this test is about
    params = make_params()

    def states():
        _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), position

    before = states()
    optimizer = ChildAdamW(params, backend=backend)
    assert optimizer.seed == 5
    train(optimizer, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer)
    assert states() == before


@both_backends
def test_the_same_dropout_as_with_adamw(backend):
    seen = []
    for make in (torch.optim.AdamW, lambda p: ChildAdamW(p, backend=backend)):
        model = small_model(dropout=0.5)
        masks = []
        model[2].register_forward_hook(lambda _, x, y, masks=masks: masks.append((y != 0).tolist()))
        train_model(model, make(model.parameters()))
        seen.append(masks)
    assert seen[0] == seen[1]


def test_seed_none_follows_torch_s_seed():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ChildAdamW(make_params()))
        torch.rand(5)  # what is drawn later does not matter
        train(runs[-1], range(2))
    assert_same_run(runs[0], runs[1])
    first, other = runs[0].param_groups[0]["params"][1], runs[2].param_groups[0]["params"][1]
    assert not same_bits(first, other)


OPTIONS = {"F": {}, "amsgrad, clipped": {"amsgrad": True, "max_grad_norm": 0.1}, "plain": {"reserve_p": 1.0}}


@pytest.mark.parametrize("make_grads", ["kept", "made anew"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_dtype
def test_a_native_step_allocates_nothing(options, dtype, make_grads):
    """torch's own record of its allocator (the profiler's [memory] events) is empty for every step after the first."""
    params = make_params(((33, 5), (3,), (4097,)), dtype=dtype)
    params.append(torch.nn.Parameter(torch.ones(6, 8, dtype=dtype).t()))
    optimizer = child_adamw(params, backend="native", **options)
    train(optimizer, [0])
    for step in (1, 2):
        if make_grads == "made anew":
            optimizer.zero_grad(set_to_none=True)
            set_grads(params, step)
        assert allocations(optimizer.step) == []
    assert allocations(lambda: torch.ones(10)) != []  # the measure measures


def allocations(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()  # else its end would count as well
    del kept
    return [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]


@both_backends
def test_zero_grad(backend):
    params = make_params()
    optimizer = child_adamw(params, backend=backend)
    train(optimizer, [0])
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
    optimizer.step()  # zero gradients are gradients: momentum and decay go on
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@both_backends
def test_each_parameter_counts_its_own_steps(backend):
    """A parameter without a gradient is skipped; its masks follow its own count, its index stays."""
    late, always = make_params(((50,), (60,)))
    run = child_adamw([late, always], backend=backend)
    for step in range(4):
        set_grads([late, always], step)
        if step < 2:
            late.grad = None
        run.step()
        assert (late in run.state) == (step >= 2)
    alone = make_params(((50,), (60,)))
    by_itself = child_adamw(alone, backend=backend)
    for step in (2, 3):
        set_grads(alone, step)
        alone[1].grad = None
        by_itself.step()
    assert run.state[late]["step"] == 2
    assert run.state[always]["step"] == 4
    assert same_bits(late, alone[0])


@both_backends
def test_frozen_and_unfrozen(backend):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = child_adamw(model.parameters(), backend=backend)
    before = model[0].weight.clone()
    train_model(model, optimizer)
    assert same_bits(before, model[0].weight)
    model[0].requires_grad_(True)
    train_model(model, optimizer, steps=1)
    assert not same_bits(before, model[0].weight)
    assert [optimizer.state[p]["step"].item() for p in model.parameters()] == [1, 1, 4, 4]


@both_backends
@every_dtype
def test_model_cast_after_construction(dtype, backend):
    late, early = small_model(), small_model().to(dtype)
    run, expected = child_adamw(late.parameters(), backend=backend), child_adamw(early.parameters(), backend=backend)
    late.to(dtype)
    train_model(late, run, dtype=dtype)
    train_model(early, expected, dtype=dtype)
    assert_same_run(run, expected)
    assert all(
        s["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for s in run.state.values()
    )


@both_backends
def test_model_used_in_inference_mode_first(backend):
    used, fresh = small_model(), small_model()
    with torch.inference_mode():
        used(torch.ones(1, 7))
    run, expected = child_adamw(used.parameters(), backend=backend), child_adamw(fresh.parameters(), backend=backend)
    train_model(used, run)
    with torch.inference_mode():
        used(torch.ones(1, 7))
    train_model(fresh, expected)
    assert_same_run(run, expected)


@both_backends
def test_lazy_modules_and_subclasses_of_parameter(backend):
    class Special(torch.nn.Parameter):
        pass

    lazy = torch.nn.LazyLinear(4)
    special = Special(torch.ones(3))
    optimizer = child_adamw([*lazy.parameters(), special], max_grad_norm=1.0, backend=backend)
    (lazy(torch.ones(2, 5)).sum() + special.sum()).backward()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in [*lazy.parameters(), special]] == [1, 1, 1]
    assert not torch.equal(special, torch.ones(3))


@both_backends
@pytest.mark.parametrize("inside", [False, True], ids=["step outside", "step inside"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_training_step(compiler, inside, backend, caplog):
    """In a compiled function the optimizer's step is a break in the graph, and does what it does elsewhere."""
    caplog.set_level(logging.ERROR)
    x = torch.linspace(-1, 1, 35).view(5, 7)

    def backward(model):
        model(x).square().sum().backward()

    def whole(model, optimizer):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()

    models = [small_model(), small_model()]
    run, expected = (child_adamw(m.parameters(), backend=backend) for m in models)
    torch._dynamo.reset()
    compiled = torch.compile(whole if inside else backward, backend=compiler)
    for _ in range(3):
        if inside:
            compiled(models[0], run)
        else:
            compiled(models[0])
            run.step()
            run.zero_grad()
        whole(models[1], expected)
    assert_same_run(run, expected)
