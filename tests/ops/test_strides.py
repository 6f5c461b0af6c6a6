"""The layout of parameters and gradients in memory does not matter, and nothing around them is written."""

import pytest
import torch
from helpers import both_backends, child_adamw, every_dtype, raw, same_bits

OPTIONS = {
    "masked": {},
    "plain": {"reserve_p": 1.0},
    "amsgrad, clipped": {"amsgrad": True, "max_grad_norm": 0.1, "reserve_p": 0.5},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
STEPS = 3


def numbers(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transposed(x):
    return x.t().contiguous().t()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def inside_a_buffer(x):
    buffer = torch.full((x.shape[0] + 2, 2 * x.shape[1] + 3), 7.0, dtype=x.dtype)
    view = buffer[1:-1, 2 : 2 + 2 * x.shape[1] : 2]
    return view.copy_(x)


def moved_by_one(x):  # an odd address, which vector loads must not need aligned
    buffer = torch.full((x.numel() + 1,), 7.0, dtype=x.dtype)
    return buffer[1:].view(x.shape).copy_(x)


def expanded(x):
    return x[:1].expand(x.shape)


def permuted(x):
    return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


# shape, layout of the parameter, layout of the gradient
LAYOUTS = {
    "transposed gradient": ((37, 11), torch.clone, transposed),
    "transposed parameter": ((37, 11), transposed, torch.clone),
    "both transposed": ((37, 11), transposed, transposed),
    "channels_last parameter": ((4, 5, 6, 7), channels_last, torch.clone),
    "channels_last gradient": ((4, 5, 6, 7), torch.clone, channels_last),
    "permuted against channels_last": ((4, 5, 6, 7), permuted, channels_last),
    "expanded gradient": ((37, 11), torch.clone, expanded),
    "parameter in a buffer": ((37, 11), inside_a_buffer, torch.clone),
    "both in buffers": ((37, 11), inside_a_buffer, inside_a_buffer),
    "moved by one": ((37, 11), moved_by_one, moved_by_one),
    "one element wide": ((129, 1), transposed, inside_a_buffer),
}


def run(param, grads, backend, options):
    p = torch.nn.Parameter(param)
    assert p.stride() == param.stride()
    optimizer = child_adamw([p], lr=0.1, backend=backend, **options)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach(), optimizer.state[p]


@both_backends
@every_dtype
@options
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_the_run_on_contiguous_copies(layout, options, dtype, backend):
    shape, of_param, of_grad = layout
    grads = [of_grad(numbers(shape, dtype, 1 + i)) for i in range(STEPS)]
    param = of_param(numbers(shape, dtype, 0))
    expected, expected_state = run(numbers(shape, dtype, 0), [g.contiguous() for g in grads], backend, options)
    got, state = run(param, grads, backend, options)
    assert got.data_ptr() == param.data_ptr()
    assert same_bits(got, expected)
    assert state.keys() == expected_state.keys()
    assert all(same_bits(state[k], expected_state[k]) for k in state)


@both_backends
@every_dtype
def test_nothing_around_a_view_is_written(dtype, backend):
    """Views whose neighbours in memory are no parameters: bits of the neighbours, NaN among them, stay."""
    buffer = torch.full((40, 50), float("nan"), dtype=dtype)
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[3:20:2, 5:44:3] = True
    inside[21:30, 1] = True
    views = [buffer[3:20:2, 5:44:3], buffer[21:30, 1]]
    params = [torch.nn.Parameter(v.fill_(1.0)) for v in views]
    before = buffer.clone()
    optimizer = child_adamw(params, lr=0.1, reserve_p=1.0, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(raw(before[~inside]), raw(buffer[~inside]))
    assert (buffer[inside] < 1).all()


@both_backends
@every_dtype
@options
def test_interleaved_views_of_one_buffer(options, dtype, backend):
    buffer = numbers((33, 8), dtype, 0)
    params = [torch.nn.Parameter(buffer[:, i::2]) for i in range(2)]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in params]
    grads = numbers((2, STEPS, 33, 4), dtype, 1)
    for ps in (params, apart):
        optimizer = child_adamw(ps, backend=backend, **options)
        for step in range(STEPS):
            for p, g in zip(ps, grads[:, step], strict=True):
                p.grad = g
            optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(params, apart, strict=True))
    assert torch.equal(buffer[:, 0::2], params[0])


@both_backends
def test_lazily_negated_gradient(backend):
    """x.conj().imag is a view whose memory holds the opposite of its values."""
    negated = torch.tensor([1 - 2j, 3 + 4j]).conj().imag
    assert negated.is_neg()
    expected, _ = run(torch.ones(2), [torch.tensor([2.0, -4.0])], backend, {"reserve_p": 1.0})
    got, _ = run(torch.ones(2), [negated], backend, {"reserve_p": 1.0})
    assert same_bits(got, expected)


@both_backends
def test_strided_state_from_a_checkpoint(backend):
    """State laid out otherwise than its parameter, as a checkpoint of another run may hold it."""
    runs = []
    for layout in (torch.clone, transposed):
        p = torch.nn.Parameter(numbers((9, 7), torch.float32, 0))
        optimizer = child_adamw([p], backend=backend)
        p.grad = numbers((9, 7), torch.float32, 1)
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0] = {k: layout(v) if v.dim() == 2 else v for k, v in state["state"][0].items()}
        optimizer.load_state_dict(state)
        optimizer.step()
        runs.append((p, optimizer.state[p]))
    assert same_bits(runs[0][0], runs[1][0])
    assert all(same_bits(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])
