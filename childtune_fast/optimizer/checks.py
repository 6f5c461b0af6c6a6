"""Checks of a ChildAdamW's child network, ranks and parameters when it is made."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..arguments import check_seed
from ..child import ChildNetwork
from ..ops.packed_mask import Masks


def check_child(child: Any, reserve_p_given: bool, reserve_p: float, decay: str) -> None:
    """Raises if the argument `child` is neither None nor a ChildNetwork, or if other arguments contradict it."""
    if child is None:
        if decay == "child":
            raise ValueError("ChildAdamW: decay='child' needs a child network; pass child=, or decay='all'")
        return
    if not isinstance(child, ChildNetwork):
        raise TypeError(f"ChildAdamW: child must be a ChildNetwork (got {child!r})")
    if reserve_p_given:
        refuse_reserve_p(reserve_p)


def refuse_reserve_p(reserve_p: Any, where: str = "") -> NoReturn:
    """Raises the ValueError for a reserve_p beside a child network."""
    raise ValueError(
        f"ChildAdamW: reserve_p is not used with child= (got {reserve_p}{where}); leave it out, the child network has "
        "a share of its own"
    )


def agreed_seed(seed: int | None) -> int:
    """Returns the seed as an unsigned integer; in an initialised process group, rank 0's."""
    agreed = [check_seed(torch.initial_seed() if seed is None else seed)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0)
    return agreed[0]


def check_masks(child: ChildNetwork, masks: Masks | None, param_groups: list[dict[str, Any]], whose: str) -> None:
    """Raises ValueError if a child network masks none of an optimizer's parameters, which the error calls `whose`.

    Parameters of its own model may be others: those of a rank, or only biases.
    """
    known = set(child.places.parameters())
    if not masks and any(param not in known for group in param_groups for param in group["params"]):
        raise ValueError(
            f"ChildAdamW: child must mask a parameter of {whose} (got a child network of {len(child.packed)} others); "
            "make it from the model whose parameters these are, after wrapping it"
        )


def check_ranks_agree(child: ChildNetwork | None) -> None:
    """Raises ValueError on all ranks of an initialised process group if their child networks differ."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if child is None else child.fingerprint)
    if len(set(found)) > 1:
        raise ValueError(
            "ChildAdamW: all ranks must have one child network, or their replicas drift apart (got "
            f"{len(set(found))} different ones, each perhaps chosen by the rank's own data); merge the ranks' "
            "FisherAccumulators before choosing, or load one file on all ranks"
        )


def check_no_lazy_negation(params: list[Tensor]) -> None:
    """Raises ValueError for a lazily negated view, such as x.conj().imag, whose memory holds the negated values."""
    for param in params:
        if param.is_neg():
            raise ValueError(
                "ChildAdamW: parameters must not be lazily negated views, such as x.conj().imag (got one of shape "
                f"{tuple(param.shape)}); pass resolve_neg() of it"
            )


def check_overlap(params: list[Tensor]) -> None:
    """Raises ValueError if two parameters share an element, or one holds an element twice (an expanded tensor).

    Views that interleave in one buffer without sharing an element pass.
    """
    spans = sorted((span for span in map(_span, params) if span is not None), key=lambda span: span[:2])
    cluster: list[tuple[str, int, int, Tensor]] = []
    for span in spans:
        if cluster and (span[0] != cluster[0][0] or span[1] >= max(s[2] for s in cluster)):
            _check_cluster(cluster)
            cluster = []
        cluster.append(span)
    _check_cluster(cluster)


def _span(param: Tensor) -> tuple[str, int, int, Tensor] | None:
    """Returns a parameter's device and the addresses where its memory begins and ends; None if it has no memory."""
    if param.numel() == 0 or param.layout != torch.strided or param.device.type == "meta":
        return None
    begin = param.data_ptr()
    extent = 1 + sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
    return str(param.device), begin, begin + extent * param.element_size(), param


def _check_cluster(cluster: list[tuple[str, int, int, Tensor]]) -> None:
    """Raises ValueError if parameters, whose spans of memory overlap, use an element of that memory twice."""
    if not cluster or (len(cluster) == 1 and _is_dense(cluster[0][3])):
        return
    begin, end = min(s[1] for s in cluster), max(s[2] for s in cluster)
    sizes = {s[3].element_size() for s in cluster}
    size = min(sizes)
    overlap = len(sizes) > 1 or any((s[1] - begin) % size for s in cluster)
    if not overlap:
        used = torch.zeros((end - begin) // size, dtype=torch.int32)
        for _, first, _, param in cluster:
            index = torch.arange(used.numel()).as_strided(param.shape, param.stride(), (first - begin) // size)
            used.put_(index, torch.ones(index.shape, dtype=torch.int32), accumulate=True)
        overlap = bool((used > 1).any())
    if overlap:
        shapes = ", ".join(str(tuple(s[3].shape)) for s in cluster)
        raise ValueError(
            f"ChildAdamW: parameters must not share memory (got overlapping ones of shapes {shapes}); pass tied "
            "weights once, and clone() expanded or overlapping views"
        )


def _is_dense(param: Tensor) -> bool:
    """Returns True if every stride leaps over all elements of the dimensions of smaller strides.

    Then no two elements share memory. The converse does not hold.
    """
    reach = 0
    for stride, n in sorted(zip(param.stride(), param.shape, strict=True)):
        if n > 1 and stride <= reach:
            return False
        reach += (n - 1) * stride
    return True
