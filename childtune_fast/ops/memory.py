"""Whether tensors have the memory that their elements need, and none of them that of another."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..arguments import PLAIN_TENSORS, has_memory, reach


def places(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """Returns what changes if one of the tensors gets another place in memory, or another shape or strides."""
    return tuple(
        (tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors if type(tensor) in PLAIN_TENSORS
    )


def check_apart(tensors: Iterable[Tensor], what: str) -> None:
    """Raises ValueError if two tensors share an element, or one holds an element twice (an expanded tensor).

    Views that interleave in one buffer without sharing an element pass, and so do tensors without memory.

    Args:
        tensors: any tensors; those of torch's own classes are looked at.
        what: what they are, with which the error begins.
    """
    spans = sorted((span for span in map(_span, tensors) if span is not None), key=lambda span: span[:2])
    cluster: list[tuple[str, int, int, Tensor]] = []
    end = 0  # of the cluster
    for span in spans:
        if cluster and (span[0] != cluster[0][0] or span[1] >= end):
            _check_cluster(cluster, what)
            cluster, end = [], 0
        cluster.append(span)
        end = max(end, span[2])
    _check_cluster(cluster, what)


def _span(tensor: Tensor) -> tuple[str, int, int, Tensor] | None:
    """Returns a tensor's device and the addresses where its memory begins and ends; None if it has no memory."""
    if type(tensor) not in PLAIN_TENSORS or tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    if tensor.numel() == 0 or not has_memory(tensor):
        return None
    begin = tensor.data_ptr()
    return str(tensor.device), begin, begin + reach(tensor) * tensor.element_size(), tensor


def _check_cluster(cluster: list[tuple[str, int, int, Tensor]], what: str) -> None:
    """Raises ValueError if tensors, whose spans of memory overlap, use an element of that memory twice."""
    if not cluster or (len(cluster) == 1 and _is_dense(cluster[0][3])):
        return
    begin, end = min(s[1] for s in cluster), max(s[2] for s in cluster)
    sizes = {s[3].element_size() for s in cluster}
    size = min(sizes)
    overlap = len(sizes) > 1 or any((s[1] - begin) % size for s in cluster)
    if not overlap:
        used = torch.zeros((end - begin) // size, dtype=torch.int32, device="cpu")
        for _, first, _, tensor in cluster:
            elements = torch.arange(used.numel(), device="cpu")
            index = elements.as_strided(tensor.shape, tensor.stride(), (first - begin) // size)
            used.put_(index, torch.ones_like(index, dtype=torch.int32), accumulate=True)
        overlap = bool((used > 1).any())
    if overlap:
        shapes = ", ".join(str(tuple(s[3].shape)) for s in cluster)
        raise ValueError(
            f"ChildAdamW: {what} must not share memory (got overlapping ones of shapes {shapes}); pass tied weights "
            "once, and clone() expanded or overlapping views"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Returns True if every stride leaps over all elements of the dimensions of smaller strides.

    Then no two elements share memory. The converse does not hold.
    """
    last = 0
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and stride <= last:
            return False
        last += (n - 1) * stride
    return True
