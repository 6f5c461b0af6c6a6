"""The codes of 8-bit state: what each means, that rounding is unbiased, and what no code can hold."""

import math
from fractions import Fraction

import pytest
import torch

from childtune_fast.ops import codes
from childtune_fast.ops.codes import (
    NEAREST,
    Codes,
    block_count,
    block_numbers,
    decode_average,
    decode_square,
    encode_average,
    encode_square,
    sanitize,
    scales_of,
)

CPU = torch.device("cpu")
BLOCK = 128
DECODE = {"average": decode_average, "square": decode_square}
ENCODE = {"average": encode_average, "square": encode_square}
both_codes = pytest.mark.parametrize("kind", ["average", "square"])
SCALES = (32, 33, 100, 127, 200, 252)  # one below the largest, so that there is a next one
MOST = torch.tensor(codes._MOST_BITS, dtype=torch.int32).view(torch.float32).item()


def number(code):
    """The small float of csrc/core/codes.h: float(e + f / 8) = 2^(e - 15) * (1 + f / 8)."""
    return Fraction(2) ** (code // 8 - 15) * (1 + Fraction(code % 8, 8))


def meaning(kind, code, scale):
    unit = Fraction(2) ** (scale - 127)
    if kind == "square":
        return number(code) * Fraction(2) ** -16 * unit
    magnitude = (number(code & 0x7F) - Fraction(2) ** -15) * unit
    return -magnitude if code >= 0x80 else magnitude


def coded(numbers, scales):
    return Codes(torch.tensor(numbers, dtype=torch.uint8), torch.tensor(scales, dtype=torch.uint8))


def encoded(kind, values, random):
    blocks = block_numbers(len(values), None, CPU)
    return ENCODE[kind](values, blocks, block_count(len(values)), random)


def decoded(kind, found):
    return DECODE[kind](found, block_numbers(len(found.codes), None, CPU))


@both_codes
@pytest.mark.parametrize("scale", [*SCALES, 253])
def test_every_code_means_what_is_documented(kind, scale):
    values = decoded(kind, coded(range(256), [scale] * 2))
    for code, value in enumerate(values.tolist()):
        assert Fraction(value) == meaning(kind, code, scale)
    assert values.abs().max() < math.inf
    if kind == "average":
        assert values[0].item() == 0.0
        assert math.copysign(1.0, values[0x80].item()) == 1.0


@both_codes
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("random", [0, NEAREST, 0xFFFFFFFF, None], ids=["lowest", "nearest", "highest", "any"])
def test_every_code_is_encoded_to_itself_by_any_random_bits(kind, scale, random):
    """In each block, the second-largest number fixes the scale. The largest is at the limit to the next scale."""
    top = 126 if kind == "average" else 254
    others = [code for code in range(256) if code not in (127, 255) and (kind, code) != ("average", 0x80)]  # another 0
    chosen = []
    for i in range(0, len(others), BLOCK - 1):
        of_block = others[i : i + BLOCK - 1]
        chosen += [top, *of_block] + [top] * (BLOCK - 1 - len(of_block))
    before = coded(chosen, [scale] * (len(chosen) // BLOCK))
    if random is None:
        random = torch.randint(0, 1 << 32, (len(chosen),), generator=torch.Generator().manual_seed(scale))
    after = encoded(kind, decoded(kind, before), random)
    assert torch.equal(after.scales, before.scales)
    assert torch.equal(after.codes, before.codes)


@pytest.mark.parametrize("scale", SCALES[:-1])
def test_a_square_keeps_its_value_when_the_scale_of_its_block_changes(scale):
    """The numbers of two scales are the same ones, above the least of the larger one."""
    chosen = list(range(40, 40 + BLOCK - 1))
    values = decoded("square", coded([*chosen, 0], [scale]))
    values[-1] = float(meaning("square", 248, scale) * 4)  # takes the block two scales up
    found = encoded("square", values, NEAREST)
    assert found.scales.tolist() == [scale + 2]
    assert torch.equal(decoded("square", found), values)


@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_is_the_smallest_that_is_enough(scale):
    limit = torch.tensor(float(meaning("average", 127, scale)))
    zero, infinity = torch.tensor(0.0), torch.tensor(math.inf)
    blocks = torch.zeros(2, dtype=torch.int64)
    for magnitude, expected in ((torch.nextafter(limit, zero), scale), (torch.nextafter(limit, infinity), scale + 1)):
        for values in ([0.0, magnitude], [-magnitude, 0.0]):
            found = scales_of(torch.tensor(values), blocks, 1)
            assert found.tolist() == [expected]


def test_tiny_values_have_the_least_scale_and_zeros_none():
    blocks = torch.arange(4).repeat_interleave(2)
    values = torch.tensor([0.0, -0.0, 1e-45, 0.0, 2.0**-96, 0.0, 2.0**-95, 0.0])
    assert scales_of(values, blocks, 4).tolist() == [0, 32, 32, 32]
    for kind in DECODE:
        found = encoded(kind, torch.zeros(200), 0xFFFFFFFF)
        assert found.codes.tolist() == [0] * 200
        assert found.scales.tolist() == [0, 0]
        assert decoded(kind, found).tolist() == [0.0] * 200


def test_what_no_code_can_hold_is_lost_or_limited():
    values = [1.0, math.inf, -math.inf, math.nan, 1.0, 1.0, 3e38, -3e38, 1.0]
    squares = [1.0, 1.0, 1.0, 1.0, math.nan, math.inf, 1.0, 1.0, 1.0]
    maxima = [1.0, 1.0, 1.0, 1.0, 1.0, math.inf, 1.0, 1.0, math.nan]
    exp_avg, (square, maximum) = sanitize(torch.tensor(values), [torch.tensor(squares), torch.tensor(maxima)])
    assert exp_avg.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, MOST, -MOST, 1.0]
    assert square.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, MOST, 1.0, 1.0, 1.0]
    assert maximum[:6].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, MOST]
    assert maximum[8].item() == 0.0


@both_codes
@pytest.mark.parametrize("random", [0, NEAREST, 0xFFFFFFFF])
def test_the_largest_that_can_be_encoded_stays_finite(kind, random):
    found = encoded(kind, torch.tensor([MOST, 1.0, 0.0]), random)
    assert found.scales.tolist() == [253]
    back = decoded(kind, found)
    assert MOST * 0.93 < back[0].item() <= meaning(kind, 127 if kind == "average" else 255, 253)
    if kind == "average":
        assert encoded(kind, torch.tensor([-MOST, 1.0, 0.0]), random).codes[0] == found.codes[0] | 0x80


def test_one_huge_value_leaves_tiny_averages_unbiased_and_squares_above_zero():
    values = torch.full((BLOCK,), 1e-3)
    values[5] = 900.0
    random = torch.arange(BLOCK) << 25  # evenly spread: each of 128 equal parts of what they can be
    average = decoded("average", encoded("average", values, random))
    # The resolution near 0 is 2^-18 of the scale, 2^9: twice the value, so that half of all are rounded to 0.
    step = 2.0**-18 * 512
    assert set(average.tolist()) == {0.0, step, average[5].item()}
    assert average[average < 1].mean().item() == pytest.approx(1e-3, abs=2 * step / BLOCK)
    squares = torch.full((BLOCK,), 1e-30)
    squares[5] = 900.0
    square = decoded("square", encoded("square", squares, random))
    assert square[square < 1].unique().tolist() == [2.0**-31 * 512]


@both_codes
@pytest.mark.parametrize("value", [1.9e-3, 0.37, 3.3e-9, 1.01, 1.62])
def test_rounding_is_unbiased_over_all_random_bits(kind, value):
    """Encoding takes 20 bits of them. Their mean is the value, up to a 20th bit: no statistics are needed."""
    random = torch.arange(1 << 20) << 12
    values = torch.full((1 << 20,), value)
    values[::BLOCK] = 1.7  # has the block's scale
    back = decoded(kind, encoded(kind, values, random)).double()
    inner = torch.ones(1 << 20, dtype=torch.bool)
    inner[::BLOCK] = False
    low, high = back[inner].min().item(), back[inner].max().item()
    assert low <= torch.tensor(value).item() <= high
    assert len(back[inner].unique()) <= 2
    # Of each 128 random numbers in a row one is left out, which moves the mean by less than that share of a step, and
    # the value by which an average is shifted before it is rounded is rounded to 2^-24 of 2^-14 at least.
    step = max(high - low, 2.0**-18)
    assert back[inner].mean().item() == pytest.approx(torch.tensor(value).item(), abs=step * (2**-13 + 2**-20))


@both_codes
def test_codes_of_a_child_network_are_those_of_its_values_among_zeros(kind):
    generator = torch.Generator().manual_seed(3)
    child = torch.rand(1000, generator=generator) < 0.3
    child[256:512] = False  # blocks without a value
    values = torch.where(child, torch.randn(1000, generator=generator).square() + 1e-6, 0.0)
    random = torch.randint(0, 1 << 32, (1000,), generator=generator)
    dense = encoded(kind, values, random)
    count = block_count(1000)
    alone = ENCODE[kind](values[child], block_numbers(1000, child, CPU), count, random[child])
    assert torch.equal(alone.codes, dense.codes[child])
    assert torch.equal(alone.scales, dense.scales)
    assert not dense.codes[~child].any()
    assert alone.scales[2:4].tolist() == [0, 0]
    back = DECODE[kind](alone, block_numbers(1000, child, CPU))
    assert torch.equal(back, decoded(kind, dense)[child])
