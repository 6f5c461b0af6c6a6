"""Steps that round stochastically have the same bits in the compiled kernels, on any number of threads, as in torch."""

import pytest
import torch
from child_models import Model, child_adamw
from helpers import assert_same_run, train

from childtune_fast import ChildAdamW

SHAPES = ((300, 1000), (33, 129), (4096,), (43,))  # the last keeps float32 state
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "8bit": {"state": "8bit"},
    "8bit, amsgrad": {"state": "8bit", "amsgrad": True},
    "8bit, stochastic": {"state": "8bit", "rounding": "stochastic", "max_grad_norm": 0.1},
    "8bit, hf": {"state": "8bit", "variant": "hf"},
    "bfloat16": {"state": "bfloat16", "amsgrad": True},
    "stochastic": {"rounding": "stochastic"},
}


def random_adamw(model, **options):
    """Returns ChildAdamW without a child network."""
    return ChildAdamW(model.parameters(), lr=1e-2, seed=2**63 + 5, **options)


def plain_adamw(model, **options):
    """Returns ChildAdamW that trains all weights."""
    return random_adamw(model, reserve_p=1.0, **options)


@pytest.mark.parametrize("make", [random_adamw, plain_adamw, child_adamw], ids=["F", "p = 1", "D"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_the_fallback(native, dtype, options, make):
    expected = make(Model(dtype, shapes=SHAPES), backend="torch", **options)
    train(expected, range(3))
    for threads, instruction_set in enumerate(native.supported_instruction_sets(), 1):
        native.set_instruction_set(instruction_set)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run = make(Model(dtype, shapes=SHAPES), backend="native", **options)
            train(run, range(3))
        finally:
            torch.set_num_threads(before)
        assert_same_run(run, expected)


@pytest.mark.parametrize("make", [plain_adamw, child_adamw], ids=["p = 1", "D"])
@pytest.mark.parametrize("options", [KINDS["8bit"], KINDS["bfloat16"], KINDS["stochastic"]], ids=str)
def test_strides_change_nothing(options, make):
    plain, odd = (Model(torch.bfloat16, shapes=((70, 120), (64, 129))) for _ in range(2))
    for param in odd.parameters():
        if param.dim() == 2:
            param.data = param.data.T.contiguous().T
    runs = [make(model, backend="native", **options) for model in (plain, odd)]
    for run in runs:
        train(run, range(3))
    assert_same_run(*runs)
