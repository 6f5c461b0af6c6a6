"""Helpers of the tests of selection and squares: adversarial scores, and gradients of sizes at every edge."""

import math

import torch

SLICE = 128 * 1024  # scores that one thread takes at a time, csrc/cpu/select.cpp
DENORMAL = 1e-45


def values(n, kind):
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(n, generator=generator)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, DENORMAL, -DENORMAL, 1.0, -1.0, 3e38, -3e38])
    return {
        "normal": normal,
        "squares": normal.square() * 1e-12,
        "all equal": torch.full((n,), 0.25),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "denormal": normal * 20 * DENORMAL,
        "infinities and extremes": special[torch.randint(len(special), (n,), generator=generator)],
        "few values": (normal * 2).round(),
        "differ in the last bit": torch.tensor(1.5).view(torch.int32).add((normal * 3).int()).view(torch.float32),
    }[kind]


KINDS = [
    "normal",
    "squares",
    "all equal",
    "zeros of both signs",
    "denormal",
    "infinities and extremes",
    "few values",
    "differ in the last bit",
]


def tensors(kind, sizes=(1000, 1, 0, 2 * SLICE + 77, 1024, SLICE, 333)):
    pieces = values(sum(sizes), kind).split(sizes)
    return {f"tensor {i}": piece for i, piece in enumerate(pieces)}


SIZES = [0, 1, 3, 127, 128, 129, 4097, 300_001]


def random_tensor(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1e-2).to(dtype)
