"""The answers that tests/cpp/test_known.cpp compares on every processor are those of the pure-torch backend."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from childtune_fast.ops import reference
from childtune_fast.ops.packed_mask import pack
from childtune_fast.ops.random_mask import KEEP_ALL, philox4x32_10
from childtune_fast.ops.step_group import StepGroup, compute_dtype

ANSWERS = Path(__file__).resolve().parents[1] / "cpp" / "known_answers.h"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COUNT = 5003


def hashed(stream):
    x = np.arange(COUNT, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(stream * 0x85EBCA77 & 0xFFFFFFFF)
    x = (x ^ x >> 15) * np.uint32(0x2C1B3C6D)
    x = (x ^ x >> 12) * np.uint32(0x297A2D39)
    return x ^ x >> 15


def tame(stream, dtype):
    return torch.from_numpy(hashed(stream).view(np.int32)).to(dtype) * 2.0**-31


def values(stream, dtype):
    integers = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    bits = hashed(stream).astype(np.uint64) << np.uint64(32) | hashed(stream + 8)
    anything = torch.from_numpy(bits.astype(integers)).view(dtype)
    even = torch.arange(COUNT) % 2 == 0
    return torch.where(
        even, tame(stream, torch.float64 if dtype == torch.float64 else torch.float32).to(dtype), anything
    )


def child_mask():
    counter = torch.zeros(4, COUNT, dtype=torch.int64)
    counter[0] = torch.arange(COUNT)
    return (philox4x32_10(counter, (3, 4))[0].long() & 0xFFFFFFFF) % 100 < 30


def digest(tensors):
    found = 0xCBF29CE484222325
    for tensor in tensors:
        bits = tensor.numpy() if tensor.dtype in (torch.float32, torch.float64) else tensor.view(torch.uint16).numpy()
        bits = bits.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[tensor.dtype.itemsize]).tolist()
        nan = tensor.isnan().tolist() if tensor.dtype.itemsize > 2 else [False] * len(bits)
        for number, is_nan in zip(bits, nan, strict=True):
            found = (found ^ (0xFFFFFFFFFFFFFFFF if is_nan else number)) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return found


def answer(mode, dtype):
    threshold = 19661 if mode == "F" else KEEP_ALL
    group = StepGroup(1e-2, 0.9, 0.999, 1e-8, 0.1, False, -0.5, threshold, False, 0x123456789ABCDEF, None)
    state = [tame(stream, compute_dtype(torch.empty(0, dtype=dtype))).abs() for stream in (2, 3)]
    if mode == "D":
        mask = child_mask()
        state = [values[: int(mask.sum())].clone() for values in state]
        group.child_bits = [pack(mask)]
    group.params, group.grads, group.indices = [values(0, dtype)], [values(1, dtype)], [5]
    group.exp_avgs, group.exp_avg_sqs, group.steps = state[:1], state[1:], [torch.tensor(2.0)]
    reference.step([group])
    return digest([*group.params, *state])


@pytest.mark.parametrize("mode", ["F", "all weights", "D"])
def test_known_answers_are_those_of_pure_torch(mode):
    (row,) = re.findall(rf'{{"{mode}", ([^}}]*)}}', ANSWERS.read_text(encoding="utf-8"))
    assert [hex(answer(mode, dtype)) for dtype in DTYPES] == row.split(", ")
