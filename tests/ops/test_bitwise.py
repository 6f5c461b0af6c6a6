"""The compiled step has the same bits as the fallback: all dtypes, sizes, threads, instruction sets and layouts."""

import pytest
import torch

from childtune_fast import ChildAdamW, ChildNetwork, bernoulli_mask
from childtune_fast.ops.packed_mask import PackedMask
from childtune_fast.ops.reference import sum_of_squares

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 3, 127, 128, 129, 4097]
OPTIONS = {
    "F": {},
    "plain": {"reserve_p": 1.0},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.5},
    "maximize": {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    "hf": {"variant": "hf", "reserve_p": 0.1, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 1e-2},
}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def params_and_grads(shapes, dtype, seed=0, steps=3):
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape, scale):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return [tensor(s, 1.0) for s in shapes], [[tensor(s, 1e-2) for s in shapes] for _ in range(steps)]


def run(backend, params, grads, **options):
    """Steps copies of `params` and returns them with their states, in a fixed order."""
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in params]
    opt = ChildAdamW(params, lr=1e-2, seed=3, backend=backend, **options)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        opt.step()
    return [t for p in params for t in (p.detach(), *(opt.state[p][key] for key in sorted(opt.state[p])))]


def assert_same_bits(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype, i
        assert torch.equal(a, b), (i, (a != b).sum())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_fallback(dtype, options, threads):
    params, grads = params_and_grads([*SIZES, 300_001], dtype)
    assert_same_bits(run("native", params, grads, **options), run("torch", params, grads, **options))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(native, name, dtype):
    if name not in native.supported_instruction_sets():
        pytest.skip(f"this processor has no {name}")
    params, grads = params_and_grads([*SIZES, 100_003], dtype, steps=2)
    expected = run("torch", params, grads, amsgrad=True)
    native.set_instruction_set(name)
    assert native.instruction_set() == name
    assert_same_bits(run("native", params, grads, amsgrad=True), expected)


def test_tensors_read_by_their_attributes(native):
    """The way for torch versions without the DLPack exchange API."""
    params, grads = params_and_grads([(5, 7), (), (130,)], torch.bfloat16)
    grads = [[step[0].t().contiguous().t(), *step[1:]] for step in grads]
    expected = run("torch", params, grads)
    native.force_attribute_access(True)
    assert native.tensor_access() == "tensor attributes"
    assert_same_bits(run("native", params, grads, max_grad_norm=1e9), expected)


def test_hundred_steps():
    params, grads = params_and_grads([(64, 65), 33], torch.float32, steps=100)
    assert_same_bits(run("native", params, grads), run("torch", params, grads))


def special_values(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.0, tiny, tiny / 4, torch.finfo(dtype).max, float("inf"), -float("inf"), float("nan")]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reserve_p": 1.0, "amsgrad": True}, {"reserve_p": 1.0, "eps": 0.0}], ids=str)
def test_special_values(dtype, options):
    """Zeros, subnormals, infinities and NaN, in every pair of parameter and gradient. All NaN are one value here."""
    special = special_values(dtype)
    param, grad = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    param, grad = param.repeat(20), grad.repeat(20)
    results = [run(backend, [param], [[grad], [grad.flip(0)]], **options) for backend in ("native", "torch")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 0x7E00), (torch.bfloat16, 0x7FC0)], ids=str)
def test_a_stored_nan_has_no_sign(dtype, bits, backend):
    """A GPU's operations make a NaN without sign, an x86's one with it; a step must store the same."""
    nans = torch.tensor([float("nan"), -float("nan")], dtype=torch.float64).to(dtype).repeat(40)
    ones, mask = torch.ones(81, dtype=dtype), torch.ones(81, dtype=torch.bool)
    nans = torch.cat([ones[:1], nans])
    grads = [ones, ones, nans]
    for options in ({"reserve_p": 1.0}, {"decay": "all"}):
        leaves = torch.nn.ParameterList([nans.clone(), torch.stack([nans, nans], dim=1)[:, 0], ones.clone()])
        child = ChildNetwork.from_masks(leaves, {"0": ~mask, "2": mask}) if "decay" in options else None
        opt = ChildAdamW(leaves, backend=backend, child=child, **options)
        for param, grad in zip(leaves, grads, strict=True):
            param.grad = grad.clone()
        opt.step()
        for param in leaves:
            assert not param[0].isnan()
            assert (param[1:].view(torch.int16) == bits).all()


@pytest.mark.parametrize("reserve_p", [2**-16, 0.02, 0.3, 1 - 2**-16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_step_applies_the_public_mask(backend, reserve_p):
    """After one step from zero, exp_avg is (1 - beta1) * gradient / share where the mask keeps, else zero."""
    shapes = [(3, 50), (130,), (7, 11, 13)]
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    opt = ChildAdamW([{"params": params[:1]}, {"params": params[1:]}], seed=-5, reserve_p=reserve_p, backend=backend)
    for step in (1, 2):
        opt.state.clear()
        for param in params:
            param.grad = torch.ones_like(param)
            opt.state[param] = {"step": torch.tensor(float(step - 1))}
            opt.state[param]["exp_avg"] = torch.zeros_like(param)
            opt.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        opt.step()
        for index, param in enumerate(params):
            kept = bernoulli_mask(param.shape, reserve_p, seed=opt.seed, step=step, param_index=index)
            share = round(reserve_p * 65536) / 65536
            expected = torch.where(kept, torch.tensor(1.0 / share) * torch.tensor(0.1), 0.0)
            assert torch.equal(opt.state[param]["exp_avg"], expected)


def test_skipped_parameters_keep_their_own_step_count():
    """A parameter without a gradient misses a step; its next mask is that of its own count, its index stays."""
    results = []
    for backend in ("native", "torch"):
        params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(2)]
        opt = ChildAdamW(params, seed=3, backend=backend)
        for with_first in (True, False, True):
            params[0].grad = torch.ones(1000) if with_first else None
            params[1].grad = torch.ones(1000)
            opt.step()
        assert [opt.state[p]["step"].item() for p in params] == [2, 3]
        results.append([p.detach() for p in params])
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_squares(native, dtype, threads):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in [*SIZES, 1023, 1025, 300_001]
    ]
    tensors.append(torch.randn((40, 70), generator=generator).to(dtype).t())
    masks = [PackedMask.pack(torch.rand(t.shape, generator=generator) < 0.3) for t in tensors]
    bits = [None if i % 3 == 0 else mask.bits for i, mask in enumerate(masks)]
    expected = sum_of_squares(tensors, bits)
    kept = [t if b is None else t * m.unpack() for t, b, m in zip(tensors, bits, masks, strict=True)]
    assert expected == sum_of_squares(kept, [None] * len(kept))
    for name in native.supported_instruction_sets():
        native.set_instruction_set(name)
        assert sum(native.sums_of_squares(tensors, bits, torch.get_num_threads())) == expected
