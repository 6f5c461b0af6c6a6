"""GradScaler's unscaling and skipping inside the step, and clipping by max_grad_norm."""

import math

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
    same_snapshot,
    set_grads,
    snapshot,
    train,
)

OPTIONS = {
    "F": {},
    "plain": {"reserve_p": 1.0, "maximize": True},
    "amsgrad": {"amsgrad": True},
    "clipped": {"max_grad_norm": 0.5},
    "hf": {"variant": "hf"},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def scaler_of(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # creates its tensors
    return scaler


@both_backends
@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaled_gradients_equal_unscaled_ones(dtype, options, backend):
    """Bitwise: multiplying by a power of two is exact, in the gradient and, there being no underflow, in the step."""
    scale = 2.0**10
    scaled, manual = make_params(dtype=dtype), make_params(dtype=dtype)
    runs = [child_adamw(p, backend=backend, **options) for p in (scaled, manual)]
    scaler = scaler_of(scale)
    for step in range(3):
        set_grads(scaled, step, scale)
        set_grads(manual, step)
        grads = [raw(p.grad) for p in scaled]
        scaler.step(runs[0])
        scaler.update(scale)
        runs[1].step()
        assert all(torch.equal(raw(p.grad), g) for p, g in zip(scaled, grads, strict=True))  # step() does not unscale
    for p, q in zip(scaled, manual, strict=True):
        p.grad = q.grad = None
    assert_same_run(*runs)


@both_backends
@options
def test_unscaled_before_the_step(options, backend):
    scaled, manual = make_params(), make_params()
    runs = [child_adamw(p, backend=backend, **options) for p in (scaled, manual)]
    scaler = scaler_of(2.0**10)
    set_grads(scaled, 0, 2.0**10)
    set_grads(manual, 0)
    scaler.unscale_(runs[0])
    assert all(same_bits(p.grad, q.grad) for p, q in zip(scaled, manual, strict=True))
    scaler.step(runs[0])
    runs[1].step()
    assert_same_run(*runs)


@both_backends
@options
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_with_infinite_gradients_is_skipped(bad, unscale_first, options, backend):
    params = make_params()
    optimizer = child_adamw(params, backend=backend, **options)
    train(optimizer, [0])
    scaler = scaler_of(4.0)
    set_grads(params, 1)
    params[1].grad[17] = bad
    if unscale_first:
        scaler.unscale_(optimizer)
    before = snapshot(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert same_snapshot(before, snapshot(optimizer))
    assert scaler.get_scale() == 2.0
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    set_grads(params, 1, 2.0)
    scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@both_backends
def test_the_first_step_is_skipped(backend):
    params = make_params()
    optimizer = child_adamw(params, backend=backend)
    scaler = scaler_of(4.0)
    set_grads(params, 0)
    params[0].grad[0] = math.inf
    scaler.step(optimizer)
    assert len(optimizer.state) == 0


@both_backends
def test_training_with_autocast_and_scaler(backend):
    """The whole recipe of torch's documentation; the loss goes down."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = child_adamw(model.parameters(), lr=0.02, max_grad_norm=1.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.linspace(-1, 1, 256).view(32, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x).float() - x.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def total_norm(params):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_equals_clip_grad_norm(dtype, backend):
    """The update is a smooth function of the gradient here (eps=1), so its error is that of the gradient.

    clip_grad_norm_ sums the squares of n numbers and rounds the clipped gradient: the factor is off by at most
    (n/2 + 3) u, the product by one u more. Ours sums in double. The update is lr * g / (|g| + eps) for one step from
    zero state, whose derivative in g is at most lr/eps; then both runs round a few times: 8 u of each term.
    """
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    lr, u = 0.5, torch.finfo(dtype).eps / 2
    given = {"lr": lr, "eps": 1.0, "weight_decay": 0.0, "reserve_p": 1.0, "backend": backend}
    set_grads(ours, 0, 10.0)
    set_grads(theirs, 0, 10.0)
    child_adamw(ours, max_grad_norm=2.0, **given).step()
    torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    child_adamw(theirs, **given).step()
    n = sum(p.numel() for p in ours)
    for p, q in zip(ours, theirs, strict=True):
        bound = lr * q.grad.abs() * (n / 2 + 4) * u + 8 * u * (lr * q.grad.abs() + q.detach().abs())
        assert ((p - q).abs() <= bound).all()


@both_backends
@every_dtype
def test_no_clipping_below_the_norm(dtype, backend):
    clipped, plain = make_params(dtype=dtype), make_params(dtype=dtype)
    set_grads(plain, 0)
    runs = [child_adamw(clipped, max_grad_norm=1.001 * total_norm(plain), backend=backend)]
    runs.append(child_adamw(plain, backend=backend))
    for optimizer in runs:
        train(optimizer, [0])
    assert_same_run(*runs)


@both_backends
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norms_that_are_not_finite(bad, backend):
    """As after clip_grad_norm_: an infinite norm makes finite gradients 0, the infinite one NaN; NaN makes all NaN."""
    ours, theirs = make_params(), make_params()
    set_grads(ours, 0)
    set_grads(theirs, 0)
    ours[1].grad[17] = theirs[1].grad[17] = bad
    given = {"reserve_p": 1.0, "backend": backend}
    runs = [child_adamw(ours, max_grad_norm=1.0, **given), child_adamw(theirs, **given)]
    runs[0].step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    runs[1].step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(p.nan_to_num(), q.nan_to_num())


@both_backends
def test_max_grad_norm_per_group(backend):
    """Each group's factor is min(1, max_grad_norm / (norm of all groups + 1e-6)); None is not clipped."""
    limits = (0.25, 0.5, None, 1e6)
    params = make_params(((7, 5), (129,), (3,), (200,)))
    scaled = make_params(((7, 5), (129,), (3,), (200,)))
    given = {"reserve_p": 1.0, "backend": backend}
    set_grads(params, 0)
    set_grads(scaled, 0)
    norm = total_norm(params)
    runs = [child_adamw([{"params": [p], "max_grad_norm": x} for p, x in zip(params, limits, strict=True)], **given)]
    runs.append(child_adamw(scaled, **given))
    factors = [1.0 if x is None else min(1.0, x / (norm + 1e-6)) for x in limits]
    for p, factor in zip(scaled, factors, strict=True):
        p.grad *= factor
    for optimizer in runs:
        optimizer.step()
    for p, q, factor in zip(params, scaled, factors, strict=True):
        # Ours multiplies the gradient by the factor rounded to float32, as `*=` does. The norm is known to 1e-15, so
        # the factor may round to the neighbour: one ulp (2^-23) in the gradient, and so in its average, plus roundings
        # by 1 - beta1: 2^-24 each.
        a, b = runs[0].state[p]["exp_avg"], runs[1].state[q]["exp_avg"]
        assert ((a - b).abs() <= b.abs() * 2**-23 * 2).all()
        if factor == 1.0:
            assert same_bits(a, b)
            assert same_bits(p, q)
        else:
            assert a.norm() < 0.9 * (1 - 0.9) * norm


@both_backends
def test_the_norm_counts_masked_and_scaled_gradients_whole(backend):
    """The norm is that of the gradients before masking, after unscaling: the published code's order."""
    masked, plain = make_params(((500,),)), make_params(((500,),))
    runs = [child_adamw(p, max_grad_norm=0.125, reserve_p=r, backend=backend) for p, r in ((masked, 0.5), (plain, 1.0))]
    for params, optimizer in zip((masked, plain), runs, strict=True):
        set_grads(params, 0)
        optimizer.step()
    kept = runs[0].state[masked[0]]["exp_avg"]
    whole = runs[1].state[plain[0]]["exp_avg"]
    assert 150 < kept.count_nonzero() < 350
    # 1/p = 2 is exact, so what the mask keeps is exactly twice what the unmasked run has
    assert same_bits(kept[kept != 0], 2 * whole[kept != 0])


@both_backends
def test_a_scaler_without_any_gradient_passes(backend):
    """It gives found_inf as the number 0 then, and no tensor."""
    optimizer, scaler = child_adamw(make_params(), backend=backend), scaler_of(8.0)
    before = snapshot(optimizer)
    scaler.step(optimizer)
    assert same_snapshot(before, snapshot(optimizer))
