"""The step in torch for many parameters at once: the reference's bits, few operations, and little memory."""

import copy
import math

import pytest
import torch
from dispatches import Dispatches
from helpers import every_dtype, raw

from benchmarks.workloads import WORKLOADS
from childtune_fast import ChildAdamW
from childtune_fast.ops import foreach, reference
from childtune_fast.ops.packed_mask import pack
from childtune_fast.ops.random_mask import KEEP_ALL, keep_threshold
from childtune_fast.ops.step_group import StepGroup, compute_dtype

SHAPES = [(0,), (1,), (3,), (127,), (128,), (129,), (4097,), (), (3, 50), (5, 0), (70, 301), (40, 60), (3000,), (6, 7)]
TRANSPOSED = {11: (0, 1), 13: (1,)}  # which of a parameter's tensors: the parameter and its gradient, or that alone
OPTIONS = {
    "F": {},
    "plain": {"keep_threshold": KEEP_ALL},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.5},
    "maximize": {"grad_factor": -0.37, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3},
    "hf": {"published_code": True, "keep_threshold": keep_threshold(0.1), "weight_decay": 0.1},
    "NaN": {"grad_factor": math.nan, "amsgrad": True},
    "infinite": {"grad_factor": math.inf, "keep_threshold": KEEP_ALL, "eps": 0.0},
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 6e4]


def make_group(dtype, shapes, slices=None, transposed=None, **options):
    """A group in the middle of training: parameters after 0, 1 or 2 steps each, and gradients with special values."""
    generator = torch.Generator().manual_seed(0)

    def tensor(shape, dtype, strided=False):
        made = torch.randn(shape[::-1] if strided else shape, generator=generator, dtype=torch.float64).to(dtype)
        return made.T if strided else made

    defaults = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False}
    defaults |= {"grad_factor": 1.0, "keep_threshold": keep_threshold(0.3), "published_code": False}
    group = StepGroup(**{**defaults, **options}, seed=2**63 + 5, max_grad_norm=None, slices=slices)
    for i, shape in enumerate(shapes):
        strided = (transposed or {}).get(i, ())
        group.params.append(tensor(shape, dtype, 0 in strided))
        group.grads.append(tensor(shape, dtype, 1 in strided))
        if i % 2:
            values = group.grads[-1].view(-1) if 1 not in strided else group.grads[-1][0]
            values[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)[: len(values)]
        group.exp_avgs.append(tensor(shape, compute_dtype(group.params[-1])))
        group.exp_avg_sqs.append(tensor(shape, compute_dtype(group.params[-1])).square())
        if group.amsgrad:
            group.max_exp_avg_sqs.append(tensor(shape, compute_dtype(group.params[-1])).square())
        group.steps.append(torch.tensor(float(i % 3), dtype=(torch.float32, torch.float64)[i % 2]))
        group.indices.append(3 * i)
    return group


def tensors_of(group):
    written = (group.params, group.exp_avgs, group.exp_avg_sqs, group.max_exp_avg_sqs, group.steps)
    return [tensor for tensors in written for tensor in tensors]


def assert_steps_alike(groups):
    """Asserts that both steps write the same bits; a NaN is a NaN, whatever its payload."""
    expected = copy.deepcopy(groups)
    reference.step(expected)
    foreach.step(groups)
    for group, like in zip(groups, expected, strict=True):
        for i, (a, b) in enumerate(zip(tensors_of(group), tensors_of(like), strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), i
            assert torch.equal(raw(a.nan_to_num(0.0)), raw(b.nan_to_num(0.0))), i


@pytest.fixture(params=[1 << 13, 1 << 24], ids=["many chunks", "one chunk"])
def _chunk_size(request, monkeypatch):
    monkeypatch.setattr(foreach, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunk_size")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_dtype
def test_equals_the_reference(dtype, options):
    """Over two groups, with parameters cut, together in a chunk, transposed, and too large to be together."""
    group = make_group(dtype, SHAPES, transposed=TRANSPOSED, **options)
    other = make_group(torch.float32, [(200,), (3, 3)], lr=0.5, weight_decay=0.0)
    assert_steps_alike([group, other])


@pytest.mark.usefixtures("_chunk_size")
def test_dtypes_may_be_mixed_in_a_group():
    groups = [make_group(dtype, SHAPES, transposed=TRANSPOSED) for dtype in (torch.float32, torch.float64)]
    for field in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "indices"):
        getattr(groups[0], field).extend(getattr(groups[1], field))
    assert_steps_alike(groups[:1])


@pytest.mark.usefixtures("_chunk_size")
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"keep_threshold": KEEP_ALL}], ids=str)
def test_shards_have_the_masks_of_their_places(options):
    """(offset, run, stride): one run, several ones, of one element too, an empty shard, and a transposed one."""
    shapes = [(4097,), (300,), (6, 50), (9, 1), (0,), (130, 2), (60, 40)]
    slices = [(127, 4097, 0), (2**33 + 77, 300, 0), (13, 50, 301), (5, 1, 127), (9, 0, 0), (40, 130, 400), (3, 2400, 0)]
    assert_steps_alike([make_group(torch.float32, shapes, slices, {6: (0,)}, **options)])


def dispatches_of_a_step(shapes, reserve_p, device):
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = ChildAdamW(params, reserve_p=reserve_p, seed=0, backend="torch")
    for param in params:
        param.grad = torch.zeros_like(param)
        averages = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(0.0), **averages}
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    with Dispatches(known=[*params, *(param.grad for param in params), *state]) as dispatches:
        optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in params)
    return dispatches


@pytest.mark.parametrize(("reserve_p", "limit"), [(0.3, 30), (1.0, 10)])
def test_a_step_of_berts_takes_few_operations_and_little_memory(reserve_p, limit):
    """The meta device is sent what the CPU is, but computes nothing; the next test compares the two."""
    shapes = WORKLOADS["bert-base"]
    dispatches = dispatches_of_a_step(shapes, reserve_p, "meta")
    assert dispatches.count <= limit * len(shapes)
    assert 2 * foreach._CHUNK_BYTES <= dispatches.peak <= 64e6


@pytest.mark.parametrize("reserve_p", [0.3, 1.0])
def test_operations_and_memory_are_those_of_the_meta_device(reserve_p, monkeypatch):
    monkeypatch.setattr(foreach, "_CHUNK_BYTES", 1 << 18)
    shapes = [(1000, 500), (129,), (3, 5), (70, 1001)]
    cpu, meta = (dispatches_of_a_step(shapes, reserve_p, device) for device in ("cpu", "meta"))
    assert 0.95 * meta.count <= cpu.count <= meta.count  # nothing is sent to the CPU, where numpy takes the root
    assert cpu.peak == meta.peak


def test_tiny_parameters_are_stepped_together():
    shapes = WORKLOADS["1000x33"]
    assert dispatches_of_a_step(shapes, 0.3, "cpu").count <= 3 * len(shapes)
    with Dispatches() as dispatches:
        foreach.sums_of_squares([torch.ones(shape) for shape in shapes], [None] * len(shapes))
    assert dispatches.count <= 5 * len(shapes)


@pytest.mark.parametrize("chunk", [1 << 14, 1 << 24], ids=["many chunks", "one chunk"])
@every_dtype
def test_the_norm_is_the_references(dtype, chunk, monkeypatch):
    """Over masked tensors and whole ones, cut and transposed; a NaN counts only where its mask keeps it."""
    monkeypatch.setattr(foreach, "_CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    sizes = [(0,), (1,), (1023,), (1024,), (1025,), (), (70, 301), (40, 60), (9000,), (3,)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    tensors[7] = tensors[7].T
    masks = [torch.rand(tensor.shape, generator=generator) < 0.3 for tensor in tensors]
    bits = [pack(mask) if i % 3 else None for i, mask in enumerate(masks)]
    tensors[8][~masks[8]] = math.nan
    expected = reference.sum_of_squares(tensors, bits)
    assert math.isfinite(expected)
    assert sum(foreach.sums_of_squares(tensors, bits)) == expected
    tensors[8][masks[8]] = math.inf
    assert sum(foreach.sums_of_squares(tensors, bits)) == math.inf
    assert foreach.sums_of_squares([], []) == []
    assert foreach.sums_of_squares(tensors[:1], bits[:1]) == [0.0]
