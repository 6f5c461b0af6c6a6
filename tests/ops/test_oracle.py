"""The step against float32 and float64 oracles that share nothing with the package but the formula in the docs."""

import math

import numpy as np
import pytest
import torch

from childtune_fast import ChildAdamW, bernoulli_mask

STEPS, SIZE = 50, 20_000
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    param = rng.standard_normal(SIZE).astype(np.float32)
    scale = 10.0 ** rng.uniform(-6, 0, SIZE)
    return param, [(rng.standard_normal(SIZE) * scale).astype(np.float32) for _ in range(STEPS)]


def oracle(param, grads, dtype, *, keep=None, share=1.0, variant="torch", lr, betas, eps, weight_decay):
    """AdamW as its formula stands, in numpy, every operation rounded to `dtype`; `keep` gives each step's mask."""
    real = np.dtype(dtype).type
    beta1, beta2 = betas
    p, m, v = param.astype(dtype), np.zeros(SIZE, dtype), np.zeros(SIZE, dtype)
    for t, grad in enumerate(grads, 1):
        g = grad.astype(dtype)
        if keep is not None:
            g = np.where(keep(t), g * real(1 / share), real(0))
        m = real(beta1) * m + real(1 - beta1) * g
        v = real(beta2) * v + real(1 - beta2) * g * g
        bias1, bias2 = 1 - math.prod([beta1] * t), math.sqrt(1 - math.prod([beta2] * t))
        if variant == "torch":
            p = p * real(1 - lr * weight_decay)
            p = p - real(lr / bias1) * m / (np.sqrt(v) / real(bias2) + real(eps))
        else:
            p = p - real(lr * bias2 / bias1) * m / (np.sqrt(v) + real(eps))
            p = p - real(lr * weight_decay) * p
    return p


def ours(param, grads, backend="native", **options):
    tensor = torch.nn.Parameter(torch.from_numpy(param.copy()))
    opt = ChildAdamW([tensor], seed=0, backend=backend, **HYPER, **options)
    for grad in grads:
        tensor.grad = torch.from_numpy(grad)
        opt.step()
    return tensor.detach().numpy()


def ulp_errors(got, exact):
    """Errors in units in the last place of a float32 of the exact value's size."""
    return np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_bitwise_equal_to_the_formula_in_float32(backend):
    """The bias corrections may differ from a plain product by roundings in double, which vanish in float32."""
    param, grads = inputs()
    assert np.array_equal(ours(param, grads, backend, reserve_p=1.0), oracle(param, grads, np.float32, **HYPER))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_masked_bitwise_equal_to_the_formula_in_float32(backend):
    param, grads = inputs(1)
    share = round(0.3 * 65536) / 65536

    def keep(t):
        return bernoulli_mask((SIZE,), 0.3, seed=0, step=t, param_index=0).numpy()

    expected = oracle(param, grads, np.float32, keep=keep, share=share, **HYPER)
    assert np.array_equal(ours(param, grads, backend, reserve_p=0.3), expected)


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_no_less_exact_than_torch(implementation):
    """One step from a given state: our largest error against float64 is at most torch's plus one ulp.

    The ulp is that of the larger of old and new weight: where they almost cancel, rounding the old one is the error.
    """
    param, grads = inputs(2)
    step = 9
    state = {"step": torch.tensor(float(step)), "exp_avg": grads[1], "exp_avg_sq": grads[2] ** 2}
    beta1, beta2 = HYPER["betas"]
    p, g, m, v = (x.astype(np.float64) for x in (param, grads[0], state["exp_avg"], state["exp_avg_sq"]))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denom = np.sqrt(v) / math.sqrt(1 - beta2 ** (step + 1)) + HYPER["eps"]
    exact = p * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] / (1 - beta1 ** (step + 1)) * m / denom
    ulp = np.spacing(np.maximum(np.abs(param), np.abs(exact.astype(np.float32)))).astype(np.float64)
    errors = []
    for make in (lambda p: torch.optim.AdamW(p, **HYPER, **implementation), lambda p: ChildAdamW(p, **HYPER)):
        tensor = torch.nn.Parameter(torch.from_numpy(param.copy()))
        opt = make([tensor])
        opt.param_groups[0].update({"reserve_p": 1.0})
        opt.state[tensor] = {k: torch.as_tensor(x).clone() for k, x in state.items()}
        tensor.grad = torch.from_numpy(grads[0])
        opt.step()
        errors.append(np.abs(tensor.detach().numpy() - exact) / ulp)
    torchs, own = errors
    assert own.max() <= torchs.max() + 1
    assert own.mean() <= torchs.mean() * 1.01  # no systematic loss


@pytest.mark.parametrize("variant", ["torch", "hf"])
def test_variants_against_float64(variant):
    """Budget per step: decay, update and difference round `p` three times by half an ulp (twice more in hf); the update
    itself is below 2^-9 of p's size here or p is tiny, so its dozen roundings add under an ulp of the larger."""
    param, grads = inputs(3)
    param = np.sign(param) * (1 + np.abs(param))  # away from zero, where an ulp of p is not that of the update
    exact = oracle(param, grads, np.float64, variant=variant, **HYPER)
    got = ours(param, grads, reserve_p=1.0, variant=variant)
    assert ulp_errors(got, exact).max() <= 2.5 * STEPS / 2


def test_variants_differ_where_the_published_code_does():
    """eps enters before the bias correction: with v tiny at the first step it damps 31.6 times as much as torch's."""
    results = {}
    for variant in ("torch", "hf"):
        param = torch.nn.Parameter(torch.zeros(1))
        opt = ChildAdamW([param], lr=1.0, eps=1e-3, weight_decay=0.0, reserve_p=1.0, variant=variant, seed=0)
        param.grad = torch.full((1,), 1e-3)
        opt.step()
        results[variant] = -param.item()
    assert results["torch"] == pytest.approx(1e-3 / (1e-3 + 1e-3), rel=1e-5)
    assert results["hf"] == pytest.approx(1e-3 / (1e-3 + 1e-3 / math.sqrt(1 - 0.999)), rel=1e-3)


def test_float64_parameters_are_stepped_in_float64():
    """Budget: the arithmetic is the oracle's; only the bias corrections differ, by t roundings of 1/(t (1 - beta2))."""
    param, grads = inputs(4)
    tensor = torch.nn.Parameter(torch.from_numpy(param).double())
    opt = ChildAdamW([tensor], seed=0, reserve_p=1.0, **HYPER)
    for grad in grads:
        tensor.grad = torch.from_numpy(grad).double()
        opt.step()
    exact = oracle(param, grads, np.float64, **HYPER)
    np.testing.assert_allclose(tensor.detach().numpy(), exact, rtol=STEPS * 1000 * 2.0**-53, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_stored_parameter(dtype):
    """One step from a given state equals the float32 step of the same values, rounded once."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, generator=generator).to(dtype)
    grad = torch.randn(SIZE, generator=generator).to(dtype)
    half, full = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.float())
    half.grad, full.grad = grad, grad.float()
    options = {"seed": 5, "lr": 1e-2}
    opt_half, opt_full = ChildAdamW([half], **options), ChildAdamW([full], **options)
    opt_half.step()
    opt_full.step()
    assert torch.equal(half.detach(), full.detach().to(dtype))
    for key in ("exp_avg", "exp_avg_sq"):
        assert opt_half.state[half][key].dtype == torch.float32
        assert torch.equal(opt_half.state[half][key], opt_full.state[full][key])
