"""Tensors of every kind that a buffer may have, and what changes the values of each in place."""

import math
import warnings

import torch

DENSE = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]])


def coo(coalesced):
    indices, values = [[0, 0, 1], [1, 1, 0]], [1.0, 2.0, math.nan]
    found = torch.sparse_coo_tensor(indices, values, (2, 3), check_invariants=True)
    return found.coalesce() if coalesced else found


def per_channel(dtype):
    scales, zero_points = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    if dtype == torch.quint8:  # floats as zero points make another scheme
        zero_points = zero_points + 0.5
    return torch.quantize_per_channel(DENSE, scales, zero_points, 0, dtype)


def float8():
    return torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)


def in_inference_mode():
    with torch.inference_mode():
        return torch.ones(3)


def _halve(tensor):
    """Halves a tensor's values, or the stored ones of a sparse tensor."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.mul_(0.5)


def _zero(tensor):
    tensor.zero_()  # a sparse one holds no element afterwards


def _fill(tensor):
    tensor.untyped_storage().fill_(1)


def _grow(tensor):
    with torch.inference_mode(tensor.is_inference()):
        tensor.resize_(9)


def _assign(tensor):
    tensor.data = torch.zeros(7, dtype=torch.float64)


# {kind: (a function that makes such a tensor, those that change one in place)}
KINDS = {
    "COO": (lambda: coo(True), [_halve, _zero]),
    "uncoalesced COO": (lambda: coo(False), [_halve, _zero, lambda t: t.add_(coo(True))]),
    "CSR": (DENSE.to_sparse_csr, [_halve, _zero]),
    "CSC": (DENSE.to_sparse_csc, [_halve, _zero]),
    "BSR": (lambda: DENSE.to_sparse_bsr((1, 2)), [_halve, _zero]),
    "BSC": (lambda: DENSE.to_sparse_bsc((1, 2)), [_halve, _zero]),
    "quantised": (lambda: torch.quantize_per_tensor(DENSE, 0.1, 3, torch.quint8), [_fill]),
    "quantised to 32 bits": (lambda: torch.quantize_per_tensor(DENSE, 0.1, 3, torch.qint32), [_fill]),
    "quantised by channel": (lambda: per_channel(torch.qint8), [_fill]),
    "quantised by channel from floats": (lambda: per_channel(torch.quint8), [_fill]),
    "requantised": (
        lambda: torch.quantize_per_tensor(DENSE, 0.1, 3, torch.qint8),
        [lambda t: t.copy_(torch.quantize_per_tensor(DENSE, 0.5, 0, torch.qint8))],
    ),
    "bool": (lambda: torch.tensor([True, False]), [_fill]),
    "complex": (lambda: torch.tensor([1 + 2j, math.nan]), [_halve]),
    "conjugated": (lambda: torch.tensor([1 + 2j]).conj(), [_halve]),
    "float8": (float8, [_fill]),
    "uint16": (lambda: torch.zeros(3, dtype=torch.uint16), [_fill]),
    "empty": (lambda: torch.zeros(0, 3), [_assign]),
    "scalar": (lambda: torch.tensor(-0.0), [_zero, _assign]),
    "NaN": (lambda: torch.tensor([math.nan, 1.0]), [_halve, _assign, _grow]),
    "transposed": (DENSE.clone().t, [_halve]),
    "expanded": (lambda: torch.ones(1).expand(3), [lambda t: t[:1].add_(1)]),
    "expanded in inference mode": (lambda: in_inference_mode().expand(2, 3), [_fill]),
    "in inference mode": (in_inference_mode, [_halve, _grow]),
}
# Tensors on the meta device have no values. Only their form can change.
META = (lambda: torch.empty(2, 3, device="meta"), [_grow])


def made(make):
    """Returns a tensor of one kind, without torch's warnings of young and deprecated kinds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()
