"""Steps with state in fewer bits: how far from float64 by what the codes resolve, and what stalls elsewhere."""

import math

import pytest
import torch
from helpers import both_backends, same_bits
from low_bit import AVERAGES, decoded, every_kind, model_of, optimizer_of

from childtune_fast import ChildAdamW

BLOCK = 128
BETA1, BETA2 = 0.9, 0.999
# The largest distance of neighbours: of a code, in units of the value above 2^-15 of its block's scale; of a bfloat16.
SPACING = {"8bit": 2.0**-3, "bfloat16": 2.0**-7}


def values_of(optimizer, param, key):
    state = optimizer.state[param]
    return (state[key] if key in state else decoded(state, key)).double()


class InFloat64:
    """AdamW in float64, and how far stochastic rounding of its state may go, as variances of each element.

    Rounding x between neighbours at a distance s, of which x is d away from one, has a variance of at most d * s, and
    of at most s^2 / 4. Roundings are independent, and unbiased, so that their variances add up, multiplied by the
    square of what is left of each after the later steps.
    """

    def __init__(self, start, state, lr):
        self.w, self.m, self.v = start.double(), torch.zeros_like(start.double()), torch.zeros_like(start.double())
        self.var_m, self.var_v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        self.spacing, self.lr, self.count = SPACING[state], lr, 0

    def step(self, grad):
        self.count += 1
        before = self.v
        self.m = BETA1 * self.m + (1 - BETA1) * grad
        self.v = BETA2 * self.v + (1 - BETA2) * grad * grad
        self.var_m = BETA1**2 * self.var_m + (self.spacing * self.largest_of_block(self.m)) ** 2 / 4
        # What was stored was a number that can be stored, so that the new value is no further from one than it moved.
        s, d = self.spacing * self.largest_of_block(self.v), (self.v - before).abs()
        self.var_v = BETA2**2 * self.var_v + torch.minimum(d * s, s * s / 4)
        m, v = self.m / (1 - BETA1**self.count), self.v / (1 - BETA2**self.count)
        self.w = self.w - self.lr * m / (v.sqrt() + 1e-8)

    @staticmethod
    def largest_of_block(x):
        return x.abs().view(-1, BLOCK).amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)


@both_backends
@every_kind
def test_200_steps_stay_within_the_budget_of_the_resolution(state, backend):
    """The errors of 8192 elements, in units of their standard deviations: none beyond 6, and no bias in their mean."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64 * BLOCK, generator=generator)
    size = torch.rand(64 * BLOCK, generator=generator) + 0.5
    param, lr = torch.nn.Parameter(start.clone()), 1e-3
    exact = InFloat64(start, state, lr)
    optimizer = ChildAdamW([param], lr=lr, reserve_p=1, weight_decay=0, seed=7, state=state, backend=backend)
    for _ in range(200):
        grad = size * (torch.rand(start.shape, generator=generator) + 0.5)
        param.grad = grad
        optimizer.step()
        exact.step(grad.double())
    for key, value, variance in (("exp_avg", exact.m, exact.var_m), ("exp_avg_sq", exact.v, exact.var_v)):
        z = (values_of(optimizer, param, key) - value) / variance.sqrt()
        assert z.abs().max() < 6, key
        assert z.square().mean() > 1e-2, key  # else the budget would say nothing
        # Roundings of a block share a random word; blocks are independent.
        assert z.mean().abs() < 6 / math.sqrt(len(start) / BLOCK), key
    # 1 / sqrt(v) is convex, so that noise in v lengthens the way: by 3 / 8 of its variance to v, up to third order.
    way, expected = start.double() - param.detach().double(), start.double() - exact.w
    noise = (exact.var_v / exact.v.square()).mean().item()
    share = (exact.var_m / exact.m.square()).mean().item()
    error = 6 * math.sqrt(share + noise) / math.sqrt(len(start) / BLOCK)
    ratio = (way / expected).mean().item()
    assert 1 - error < ratio < 1 + 3 / 8 * noise + error


@every_kind
def test_a_constant_gradient_takes_the_second_moment_to_its_limit(state):
    """Rounded to nearest, the last part of the way is too small for the format: torch's bfloat16 stays at a half."""
    param = torch.nn.Parameter(torch.zeros(1 << 12))
    optimizer = ChildAdamW([param], lr=1e-6, reserve_p=1, seed=7, state=state, backend="native")
    param.grad = torch.full_like(param, 1e-3)
    for _ in range(10_000):
        optimizer.step()
    limit = 1e-6 * (1 - BETA2**10_000)
    assert values_of(optimizer, param, "exp_avg_sq").mean().item() == pytest.approx(limit, rel=0.02)
    assert values_of(optimizer, param, "exp_avg").mean().item() == pytest.approx(1e-3, rel=0.02)


@every_kind
def test_weights_of_small_gradients_go_their_way_beside_a_large_one(state):
    ways = {}
    for word in ("float32", state):
        param = torch.nn.Parameter(torch.zeros(1 << 13))
        optimizer = ChildAdamW([param], lr=1e-4, reserve_p=1, weight_decay=0, seed=7, state=word, backend="native")
        generator = torch.Generator().manual_seed(0)
        large = torch.arange(len(param)) % BLOCK == 17
        for _ in range(1000):
            grad = torch.rand(param.shape, generator=generator) + 0.5
            param.grad = torch.where(large, grad, 3e-4 * grad)
            optimizer.step()
        ways[word] = param.detach().double()[~large]
    ratio = ways[state] / ways["float32"]
    assert 0.9 < ratio.mean() < 1.1
    assert ratio.min() > 0.5
    assert ratio.max() < 2


@both_backends
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_child_network_has_the_codes_of_a_dense_run_without_gradients_outside(amsgrad, backend):
    model, dense_model = model_of(), model_of()
    options = {"state": "8bit", "amsgrad": amsgrad, "backend": backend}
    optimizer, dense = optimizer_of("D", model, **options), optimizer_of("p = 1", dense_model, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for (name, param), other in zip(model.named_parameters(), dense_model.parameters(), strict=True):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad * 10.0 ** (torch.rand(param.shape, generator=generator) * 8).round()
            other.grad = param.grad * model.masks[name] if name in model.masks else param.grad.clone()
        optimizer.step()
        dense.step()
    for (name, param), other in zip(model.named_parameters(), dense_model.parameters(), strict=True):
        state, of_dense, mask = optimizer.state[param], dense.state[other], model.masks.get(name)
        inside = ... if mask is None else mask
        assert same_bits(param.detach()[inside], other.detach()[inside])
        for key, value in state.items():
            compact = key != "step" and "scales" not in key
            assert same_bits(value, of_dense[key][inside] if compact else of_dense[key]), (name, key)
            if "codes" in key:
                assert value.any()
            if key == "exp_avg_codes":  # a square of code 0 is 2^-31 of the scale, and another code when that falls
                assert not of_dense[key][~mask].any()


@both_backends
def test_what_is_not_finite_loses_its_state_and_leaves_its_block_alone(backend):
    odd = {0: math.inf, 1: -math.inf, 2: math.nan, 130: 1e30}
    params = [torch.nn.Parameter(torch.ones(1 << 12)) for _ in range(2)]
    optimizer = ChildAdamW(params, reserve_p=1, seed=7, state="8bit", amsgrad=True, backend=backend)
    for _ in range(2):
        for param in params:
            param.grad = torch.full_like(param, 1e-2)
        for i, value in odd.items():
            params[0].grad[i] = value
        optimizer.step()
    average, square, maximum = (values_of(optimizer, params[0], key) for key in AVERAGES)
    for i in (0, 1, 2):
        assert average[i] == 0
        assert params[0][i].isnan() or params[0][i].isinf()
    for values in (average, square, maximum):
        assert values.isfinite().all()
    # The first block has the codes that it would have without these, and the others' weights are what they were.
    usual = values_of(optimizer, params[1], "exp_avg")
    scales, usual_scales = (optimizer.state[param]["exp_avg_scales"].tolist() for param in params)
    assert [scales[0], *scales[2:]] == [usual_scales[0], *usual_scales[2:]]
    assert 0.5 < (average[3:128] / usual[3:128]).mean() < 1.5
    assert params[0][3:128].isfinite().all()
    # 1e30^2 is more than a float32 holds: its square is the largest that a code does.
    assert 1.4e38 < square[130] < 1.6e38
