"""Tensors of every kind: read in parts, made of them again, compared by bits, written in place."""

import pytest
import torch
from tensor_kinds import DENSE, KINDS, META, made

from childtune_fast.ops.tensor_parts import copied, kind_of, overwrite, parts, rebuilt, same_bits

of_every_kind = pytest.mark.parametrize("make", [make for make, _ in KINDS.values()], ids=KINDS)


@of_every_kind
def test_a_tensor_is_made_of_its_parts_again(make):
    tensor = made(make)
    inside = parts(tensor)
    again = rebuilt(kind_of(tensor), tensor.shape, inside)
    assert all(part.layout == torch.strided and not part.is_quantized for part in inside.values())
    assert type(again) is torch.Tensor
    assert (again.layout, again.dtype, again.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert same_bits(again, tensor)
    assert again.is_quantized == tensor.is_quantized
    assert again.layout != torch.sparse_coo or again.is_coalesced() == tensor.is_coalesced()
    if tensor.is_quantized:
        assert torch.equal(again.dequantize(), tensor.dequantize())
        assert again.qscheme() == tensor.qscheme()


@pytest.mark.parametrize(
    ("make", "change"),
    [(make, change) for make, changes in [*KINDS.values(), META] for change in changes],
)
def test_a_change_is_seen_and_undone_in_place(make, change):
    tensor = made(make)
    before = copied(tensor)
    assert same_bits(tensor, before)
    made(lambda: change(tensor))
    assert not same_bits(tensor, before)
    overwrite(tensor, before)
    assert same_bits(tensor, before)
    assert tensor.is_inference() == made(make).is_inference()


def test_equal_values_with_other_bits_are_not_the_same():
    for a, b in [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.ones(2, 1)),
        (DENSE, made(DENSE.to_sparse_csr)),
        (made(DENSE.to_sparse_csr), made(DENSE.to_sparse_csc)),
        (torch.ones(2), torch.ones(2, device="meta")),
    ]:
        assert not same_bits(a, b)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: DENSE.to_mkldnn(), "mkldnn"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.nn.UninitializedBuffer(), "uninitialized"),
    ],
)
def test_what_cannot_be_read_is_named(make, kind):
    with pytest.raises(TypeError, match=rf"dense, sparse, or quantised to 8 or 32 bits \(got {kind}\)$"):
        parts(made(make))


def test_a_wrapper_of_tensors_is_read_through_what_it_wraps():
    tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    before = copied(tensor)
    tensor.mul_(2)
    assert not same_bits(tensor, before)
    overwrite(tensor, before)
    assert same_bits(tensor, before)
    assert tensor.values().tolist() == [1, 1, 1, 1, 1]


def test_indices_outside_of_the_shape_are_refused():
    csr = parts(made(DENSE.to_sparse_csr))
    csr["col_indices"] = csr["col_indices"] + 3
    with pytest.raises(RuntimeError, match="col_indices"):
        rebuilt("sparse_csr", DENSE.shape, csr)
    coo = parts(DENSE.to_sparse())
    coo["indices"] = coo["indices"] + 3
    with pytest.raises(RuntimeError, match="size is inconsistent"):
        rebuilt("sparse_coo", DENSE.shape, coo)
