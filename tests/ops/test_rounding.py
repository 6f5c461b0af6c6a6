"""Stochastic rounding: where its random bits come from, and that it is unbiased, whatever the weights' dtype."""

import math

import pytest
import torch

from childtune_fast.ops.random_mask import BLOCK
from childtune_fast.ops.rounding import ROUNDING_VERSION, RoundingBits, rounding_bits, stored_randomly

CPU = torch.device("cpu")
MASK32 = 0xFFFFFFFF
KEY = {"seed": 0x123456789ABCDEF, "step": 5, "param_index": 3, "device": CPU}
DTYPES = {"bfloat16": (torch.bfloat16, 16), "float16": (torch.float16, 19)}  # how many bits are not looked at
both_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def philox(counter, key):
    """Philox 4x32-10 (Salmon et al., 2011), in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high, low = divmod(0xD2511F53 * c[0], 1 << 32), divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [low[0] ^ c[1] ^ k0, low[1], high[0] ^ c[3] ^ k1, high[1]]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def test_the_kernels_place_bits_by_the_same_version(native):
    assert native.ROUNDING_VERSION == ROUNDING_VERSION


@pytest.mark.parametrize("offset", [0, 128 * 5, 128 * ((1 << 32) + 7)])
def test_bits_are_those_of_the_documented_counter(offset):
    found = rounding_bits(300, offset=offset, **KEY)
    for array, bits in enumerate(found):
        for element in (0, 1, 127, 128, 299):
            block, j = divmod(offset + element, BLOCK)
            counter = (block & MASK32, (block >> 32) | 1 << 31, KEY["step"], KEY["param_index"])
            word = philox(counter, (KEY["seed"] & MASK32, KEY["seed"] >> 32))[array]
            assert bits[element].item() == word ^ int(f"{j:07b}"[::-1], 2) << 25


def test_no_mask_uses_these_counters():
    """A block of a mask has sixteen counters, so that those of all 2^62 elements are below 2^63."""
    most_of_masks = (1 << 62) // BLOCK * 16 + 15
    assert most_of_masks >> 32 < 1 << 31


def test_an_elements_bits_depend_on_its_place_in_the_whole_alone():
    whole = rounding_bits(1000, offset=0, **KEY)
    for offset, count in ((0, 128), (256, 700), (896, 104)):
        part = rounding_bits(count, offset=offset, **KEY)
        assert all(torch.equal(p, w[offset : offset + count]) for p, w in zip(part, whole, strict=True))


def test_bits_differ_by_seed_step_parameter_and_array():
    found = [rounding_bits(256, **{**KEY, "offset": 0, **change}) for change in ({}, {"seed": 1}, {"step": 6})]
    found.append(rounding_bits(256, **{**KEY, "offset": 0, "param_index": 4}))
    arrays = [bits for of_one in found for bits in of_one]
    for i, a in enumerate(arrays):
        assert all((a == b).sum() < 3 for b in arrays[:i])
    assert RoundingBits._fields == ("exp_avg", "exp_avg_sq", "param", "max_exp_avg_sq")


def test_bits_are_uniform_and_spread_evenly_within_a_block():
    blocks = 1 << 12
    bits = rounding_bits(blocks * BLOCK, offset=0, **KEY).param.double().view(blocks, BLOCK) / 2**32
    # Blocks are independent, so that the mean of one element over all of them has this standard error; six of it.
    assert (bits.mean(0) - 0.5).abs().max() < 6 * math.sqrt(1 / 12 / blocks)
    for p in (0.5, 0.1, 0.013):
        up = (bits < p).double().mean(1)
        assert abs(up.mean().item() - p) < 6 * math.sqrt(p * (1 - p) / BLOCK / blocks)
        # Independent numbers would have p (1 - p) / 128. These fill the range evenly, as multiples of the golden ratio
        # do: how many of 128 are below p is wrong by 2 or so at most.
        assert ((up - p) * BLOCK).abs().max() < 3
        assert up.var().item() < p * (1 - p) / BLOCK / 2


def neighbours(value, dtype):
    nearest = torch.tensor(value).to(dtype)
    if nearest.item() <= value:
        return nearest, torch.nextafter(nearest, torch.tensor(math.inf, dtype=dtype))
    return torch.nextafter(nearest, torch.tensor(-math.inf, dtype=dtype)), nearest


VALUES = {
    "bfloat16": (1.001, -3.1416, 1e-3, 7e-39, -2e-40, 3.38e38),
    "float16": (1.001, -3.1416, 1e-3, 6.2e-5, 3.1e-6, -4.7e-8, 2e-8, 65503.0),
}


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, values in VALUES.items() for v in values])
def test_rounding_is_unbiased_over_all_random_bits(dtype, value):
    """Every number of the high bits once: the mean is the value, without statistics."""
    dtype, unused = DTYPES[dtype]
    random = torch.arange(1 << (32 - unused)) << unused
    value = torch.tensor(value).item()
    rounded = stored_randomly(torch.full(random.shape, value), dtype, random)
    low, high = (x.item() for x in neighbours(value, dtype))
    assert set(rounded.tolist()) <= {low, high}
    mean = rounded.double().mean().item()
    # float32's bits beyond those looked at do not count: less than one number of them.
    assert mean == pytest.approx(value, abs=(high - low) / len(random))


@both_dtypes
def test_what_the_dtype_holds_stays(dtype):
    dtype, _ = DTYPES[dtype]
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    numbers = numbers[~numbers.isnan()]
    for random in (0, 0x80000000, MASK32):
        rounded = stored_randomly(numbers.float(), dtype, torch.full(numbers.shape, random))
        assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


@both_dtypes
def test_infinity_comes_where_rounding_to_nearest_has_it(dtype):
    dtype, unused = DTYPES[dtype]
    largest = torch.finfo(dtype).max
    spacing = largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    threshold = torch.tensor(largest + spacing / 2)
    below = torch.nextafter(threshold, torch.tensor(0.0))
    for sign in (1, -1):
        for random in (0, MASK32):
            bits = torch.full((3,), random)
            values = sign * torch.stack([torch.tensor(float(largest)), below, threshold])
            rounded = stored_randomly(values, dtype, bits).float()
            assert rounded.tolist() == [sign * largest, sign * largest, sign * math.inf]
            assert torch.equal(rounded, values.to(dtype).float())
    odd = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    rounded = stored_randomly(odd, dtype, torch.full((4,), MASK32))
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()
    assert unused in (16, 19)


def test_float32_stays():
    values = torch.tensor([1.1, math.inf])
    assert stored_randomly(values, torch.float32, torch.full((2,), MASK32)) is values
