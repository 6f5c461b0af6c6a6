"""Where the elements of a rank's part lie in the whole tensor, against a cut tensor of flat indices."""

import math

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from childtune_fast.ops.shards import LocalPart

PARTS = {
    "whole": LocalPart((3, 4), (((0, 3),), ((0, 4),))),
    "rows": LocalPart((5, 3), (((2, 2),), ((0, 3),))),
    "columns": LocalPart((5, 7), (((0, 5),), ((3, 4),))),
    "a box": LocalPart((4, 5, 6), (((1, 2),), ((2, 3),), ((4, 1),))),
    "rows apart": LocalPart((8, 3), (((0, 2), (4, 2), (7, 1)), ((0, 3),))),
    "columns apart": LocalPart((2, 9), (((0, 2),), ((1, 2), (5, 3)))),
    "both apart": LocalPart((6, 7), (((1, 1), (3, 2)), ((0, 2), (4, 1), (6, 1)))),
    "no element": LocalPart((4, 3), (((0, 0),), ((0, 3),))),
    "of no element": LocalPart((0, 3), (((0, 0),), ((0, 3),))),
    "a number": LocalPart((), ()),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_flat_indices_and_positions(part):
    total = math.prod(part.whole)
    held = part.cut(torch.arange(total).view(part.whole)).reshape(-1)
    if held.numel():
        assert torch.equal(part.flat_indices(torch.arange(held.numel())), held)
        assert torch.equal(part.flat_indices(torch.arange(held.numel()).flip(0)), held.flip(0))
    for index in range(total + 3):
        assert part.position(index) == int((held < index).sum())
