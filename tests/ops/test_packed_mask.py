"""Packed masks: packing, offsets, and the refusal of damaged bits."""

import pytest
import torch

from childtune_fast.ops.packed_mask import BLOCK, PackedMask, fingerprint, packed_size

SIZES = [0, 1, 3, 7, 8, 9, 127, 128, 129, 1023, 1024, 1025, 4097]


@pytest.mark.parametrize("n", SIZES)
def test_packing_is_undone_by_unpacking(n):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.3
    packed = PackedMask.pack(mask)
    assert torch.equal(packed.unpack(), mask)
    assert packed.count == mask.sum()
    assert packed.bits.numel() == packed_size(n)


def test_offsets_count_the_weights_before_each_block():
    mask = torch.rand(5 * BLOCK + 17, generator=torch.Generator().manual_seed(0)) < 0.3
    offsets = PackedMask.pack(mask).offsets
    assert offsets.tolist() == [int(mask[: b * BLOCK].sum()) for b in range(7)]


def test_bit_i_of_byte_b_is_weight_8b_plus_i():
    packed = PackedMask.pack(torch.arange(16) == 10)
    assert packed.bits[:2].tolist() == [0, 4]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gather_and_scatter_go_by_flat_index(layout):
    dense = torch.arange(12.0).view(3, 4)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    if layout == "transposed":
        dense = dense.t().contiguous().t()
    packed = PackedMask.pack(mask)
    assert packed.gather(dense).tolist() == [0.0, 3.0, 9.0, 10.0]
    assert torch.equal(packed.scatter(packed.gather(dense)), torch.where(mask, dense, 0.0))


def test_a_scalar_has_one_bit():
    packed = PackedMask.pack(torch.tensor(True))
    assert packed.shape == ()
    assert packed.count == 1


@pytest.mark.parametrize("byte", [1, 2, 127])
def test_bits_beyond_the_weights_are_refused(byte):
    bits = torch.zeros(128, dtype=torch.uint8)
    bits[byte] = 4 if byte == 1 else 1
    with pytest.raises(ValueError, match="beyond the 10 weights"):
        PackedMask((10,), bits)


@pytest.mark.parametrize(
    "bits", [torch.zeros(127, dtype=torch.uint8), torch.zeros(128), torch.zeros(256, dtype=torch.uint8)[::2]]
)
def test_bits_of_another_kind_are_refused(bits):
    with pytest.raises(ValueError, match="must be a contiguous uint8 tensor of 128 bytes"):
        PackedMask((10,), bits)


def test_the_fingerprint_is_of_shapes_and_bits_in_any_order():
    a, b = (PackedMask.pack(torch.arange(12).view(3, 4) == i) for i in (3, 5))
    assert fingerprint([a, b]) == fingerprint([b, a])
    assert fingerprint([a, b]) != fingerprint([a, a])
    assert fingerprint([a]) != fingerprint([PackedMask((12,), a.bits)])
