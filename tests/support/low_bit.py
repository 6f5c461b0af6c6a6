"""Helpers of the tests of state in fewer bits: parameters that have it, models with masks, and what a state holds."""

import pytest
import torch
from child_models import Model
from helpers import make_params

from childtune_fast import ChildAdamW
from childtune_fast.ops.codes import Codes, block_numbers, decode_average, decode_square

LARGE = ((70, 64), (4099,), (8, 5, 110))  # of 4096 weights or more, two of them no multiple of 128
SHAPES = (*LARGE, (129,), ())
KINDS = ("bfloat16", "8bit")
AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
every_kind = pytest.mark.parametrize("state", KINDS)
every_mode = pytest.mark.parametrize("mode", ["p = 1", "F", "D"])


def model_of(dtype=torch.float32, seed=0):
    """Has masks for all parameters but the last; the second to last is small."""
    return Model(dtype, SHAPES, seed=seed)


def optimizer_of(mode, model, **options):
    options = {"lr": 1e-2, "seed": 7, **options}
    if mode == "D":
        return ChildAdamW(model.parameters(), **{"child": model.child(), **options})
    return ChildAdamW(model.parameters(), **{"reserve_p": 1.0 if mode == "p = 1" else 0.3, **options})


def params_of(seed=0):
    return make_params(SHAPES, seed=seed)


def decoded(state, key, child=None):
    """The floats of an average in a state's codes; `child` is the mask of the parameter, where it has one."""
    codes, scales = state[f"{key}_codes"], state[f"{key}_scales"]
    numel = codes.numel() if child is None else child.numel()
    blocks = block_numbers(numel, None if child is None else child.reshape(-1), codes.device)
    of = decode_average if key == "exp_avg" else decode_square
    return of(Codes(codes.reshape(-1), scales), blocks).view(codes.shape)
