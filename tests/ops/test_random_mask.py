"""The mask: known answers of its generator, its statistics, and that nothing but the element's place decides it."""

import math

import pytest
import torch

from childtune_fast import bernoulli_mask
from childtune_fast.native.load import load_native
from childtune_fast.ops.random_mask import KEEP_ALL, MASK_VERSION, keep_threshold, philox4x32_10

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    assert load_native().philox4x32_10(counter, key) == output
    words = philox4x32_10(torch.tensor(counter).repeat(3, 1).T.contiguous(), tuple(key))
    assert (words.long() & 0xFFFFFFFF).tolist() == [[word] * 3 for word in output]


def test_both_languages_place_elements_by_one_version():
    assert load_native().MASK_VERSION == MASK_VERSION


def mask(shape, reserve_p=0.3, **kwargs):
    return bernoulli_mask(shape, reserve_p, **{"seed": 1, "step": 1, "param_index": 0, **kwargs})


def test_placement_is_the_documented_one():
    """Element 128 b + 32 word + 16 half + j takes half `half` of word `word` of counter 16 b + j."""
    seed, step, index, threshold = 0x0123456789ABCDEF, 7, 3, keep_threshold(0.3)
    got = mask((1000,), seed=seed, step=step, param_index=index, offset=2**36 + 12345)
    for i in range(0, 1000, 37):
        element = 2**36 + 12345 + i
        block, place = divmod(element, 128)
        word, half, j = place // 32, place // 16 % 2, place % 16
        number = 16 * block + j
        counter = [number & 0xFFFFFFFF, number >> 32, step, index]
        out = load_native().philox4x32_10(counter, [seed & 0xFFFFFFFF, seed >> 32])
        assert got[i].item() == ((out[word] >> (16 * half)) & 0xFFFF < threshold)


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 1000, 2**33 + 5, 2**40 + 77])
@pytest.mark.parametrize("count", [0, 1, 129, 5000])
def test_a_piece_has_the_mask_of_its_place(offset, count):
    start = offset - offset % 128 - 256 if offset >= 384 else 0
    whole = mask((offset - start + count,), offset=start)
    assert torch.equal(mask((count,), offset=offset), whole[offset - start :])


def test_chunks_are_seamless(monkeypatch):
    whole = mask((10_000,), offset=77)
    monkeypatch.setattr("childtune_fast.ops.random_mask._CHUNK_BLOCKS", 3)
    assert torch.equal(mask((10_000,), offset=77), whole)


def test_shape_does_not_matter():
    assert torch.equal(mask((30, 40)).flatten(), mask(1200))
    assert mask(()).shape == ()
    assert mask((3, 0, 2)).shape == (3, 0, 2)


@pytest.mark.parametrize("reserve_p", [2**-16, 0.1, 0.3, 0.5, 0.9, 1 - 2**-16])
def test_share_of_kept_weights(reserve_p):
    """Within 5 standard deviations of a binomial count: a false alarm in two million."""
    n, p = 1 << 21, keep_threshold(reserve_p) / KEEP_ALL
    kept = mask((n,), reserve_p).sum().item()
    assert abs(kept - n * p) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 2}, {"param_index": 1}, {"offset": 2**35}]
)
def test_masks_of_other_arguments_are_independent(other):
    """Two independent masks agree in a share p^2 + (1-p)^2 of places; 5 standard deviations."""
    n, p = 1 << 20, keep_threshold(0.3) / KEEP_ALL
    agree = (mask((n,)) == mask((n,), **other)).sum().item()
    expected = p * p + (1 - p) * (1 - p)
    assert abs(agree - n * expected) <= 5 * math.sqrt(n * expected * (1 - expected))


@pytest.mark.parametrize("lag", [1, 2, 8, 16, 32, 64, 128, 256])
def test_elements_are_independent_of_their_neighbours(lag):
    """The covariance at a lag, in standard deviations of that of independent elements; the pattern repeats at 128."""
    n, p = 1 << 20, keep_threshold(0.3) / KEEP_ALL
    centred = mask((n + lag,)).double() - p
    z = (centred[:-lag] * centred[lag:]).sum().item() / (p * (1 - p) * math.sqrt(n))
    assert abs(z) < 5


def test_keep_all_keeps_all():
    assert mask((1000,), 1.0).all()
    assert keep_threshold(1) == KEEP_ALL


def test_negative_seeds_are_those_of_torch():
    assert torch.equal(mask((999,), seed=-1), mask((999,), seed=2**64 - 1))


@pytest.mark.parametrize("reserve_p", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), 1e-6])
def test_reserve_p_out_of_range(reserve_p):
    with pytest.raises(ValueError, match="reserve_p"):
        mask((3,), reserve_p)


@pytest.mark.parametrize("reserve_p", ["0.3", None, True, [0.3]])
def test_reserve_p_of_another_type(reserve_p):
    with pytest.raises(TypeError, match="reserve_p must be a float"):
        mask((3,), reserve_p)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("seed", 2**64, ValueError),
        ("seed", 1.0, TypeError),
        ("step", -1, ValueError),
        ("step", 2**32, ValueError),
        ("param_index", 2**32, ValueError),
        ("offset", -1, ValueError),
    ],
)
def test_arguments_out_of_range(argument, value, error):
    with pytest.raises(error, match=argument):
        mask((3,), **{argument: value})


def test_torchs_random_state_is_untouched():
    before = torch.get_rng_state()
    mask((1000,))
    assert torch.equal(torch.get_rng_state(), before)
