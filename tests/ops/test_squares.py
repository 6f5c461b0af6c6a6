"""The compiled accumulation of squares has the same bits as the fallback, and both notice what is not finite."""

import pytest
import torch
from helpers import every_dtype, same_bits
from scores import SIZES, random_tensor

from childtune_fast.ops import reference


def assert_same(native, grad, threads=1, weight=0.3, grad_factor=-1.7):
    scores = [random_tensor(grad.shape, torch.float32, 1).square() for _ in range(2)]
    finite = [
        native.accumulate_squares(scores[0], grad, weight, grad_factor, threads),
        bool(reference.accumulate_squares(scores[1], grad, weight, grad_factor)),
    ]
    assert finite[0] == finite[1] == bool(grad.isfinite().all())
    assert same_bits(*scores)


@every_dtype
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_equals_fallback(native, dtype, name, threads):
    if name not in native.supported_instruction_sets():
        pytest.skip(f"this processor has no {name}")
    native.set_instruction_set(name)
    for size in SIZES:
        assert_same(native, random_tensor((size,), dtype), threads)


@every_dtype
@pytest.mark.parametrize("access", [False, True], ids=["DLPack", "attributes"])
def test_strides(native, dtype, access):
    native.force_attribute_access(access)
    whole = random_tensor((40, 70, 129), dtype)
    for grad in (
        whole.permute(2, 0, 1),
        whole[:, ::3, ::2],
        whole[0, 0, 0],
        whole[:, :0],
        whole[:1].expand(5, 70, 129),
    ):
        assert_same(native, grad, threads=2)


def test_formula(native):
    """Numbers that no rounding touches."""
    score = torch.tensor([1.0, 2.0, 3.0])
    assert native.accumulate_squares(score, torch.tensor([2.0, -4.0, 0.0]), 0.5, 0.25, 1)
    assert score.tolist() == [1.125, 2.5, 3.0]


@every_dtype
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_one_gradient_that_is_not_finite(native, dtype, value):
    for name in native.supported_instruction_sets():
        native.set_instruction_set(name)
        for size in (1, 129, 4097, 300_001):
            for at in {0, size // 2, size - 1}:
                grad = torch.zeros(size, dtype=dtype)
                grad[at] = value
                assert not native.accumulate_squares(torch.zeros(size), grad, 1.0, 1.0, 2)
                assert not native.accumulate_squares(torch.zeros(size, 1), grad[:, None].expand(size, 1), 1.0, 1.0, 2)


@every_dtype
def test_extreme_gradients_are_finite(native, dtype):
    """The largest and the smallest numbers of a dtype; their squares may leave float32's range."""
    info = torch.finfo(dtype)
    assert_same(
        native, torch.tensor([info.max, -info.max, info.smallest_normal, info.smallest_normal / 2], dtype=dtype)
    )


@pytest.mark.parametrize(
    ("score", "grad", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3), "score must be float32"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), "score must be float32 and contiguous"),
        (torch.zeros(1).expand(3), torch.zeros(3), "score must be float32 and contiguous"),
        (torch.zeros(3), torch.zeros(4), "one shape"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "must be float32, float64"),
    ],
)
def test_refused(native, score, grad, message):
    with pytest.raises(ValueError, match=message):
        native.accumulate_squares(score, grad, 1.0, 1.0, 1)
