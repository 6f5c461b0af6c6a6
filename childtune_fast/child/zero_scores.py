"""Scores of 0, among which a choice would be by position alone: refused if all are, and warned of if some are kept.

Where not all weights are kept and one without a place has a score above 0, each that is kept has one, too. That is
looked for at the beginning of the tensors, and nearly always found in the first: no pass over the scores is needed.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import is_sharded
from ..ops.packed_mask import BLOCK, PackedMask, unpack
from ..ops.reference import numbers

_SAMPLE = 4 * BLOCK  # weights of a tensor that are looked at before all are counted, in whole rows
_SHOWN = 3  # names in a warning
_EXPERT = re.compile("expert", re.IGNORECASE)
_LORA_A = re.compile(r"(^|\.)lora_(embedding_)?A(\.|$)", re.IGNORECASE)
_UNDERFLOW = "for gradients below 1e-23, as a tiny grad_clip makes them, whose squares are 0 in float32"


class Counts(NamedTuple):
    """How many of the weights among which a share is chosen have which scores, over all ranks.

    Attributes:
        total: all of them.
        kept: those in the child network.
        above: those with a score above 0.
        zero: those with a score of 0.
    """

    total: int
    kept: int
    above: int
    zero: int

    @property
    def kept_zeros(self) -> int:
        """How many are kept although others with the same score of 0 are not."""
        return self.kept - self.above if self.above < self.kept < self.above + self.zero else 0


def check_zero_scores(
    scores: Mapping[str, Tensor], packed: Mapping[str, PackedMask], by_tensor: bool, *, largest: bool
) -> None:
    """Warns if weights with a score of 0 were chosen although others with that score were not.

    Where the lowest scores are chosen, zeros are rightly among them, and nothing is said.

    All ranks that hold parts of a score must come here. They warn or raise together, for their counts are added up.

    Args:
        scores: {parameter name: its scores}, whole or DTensors.
        packed: {parameter name: the mask that was chosen by them}, with the same names.
        by_tensor: whether the share was chosen in each tensor.
        largest: whether the highest scores were chosen, or else the lowest.

    Raises:
        ValueError: all scores are 0, so that nothing distinguishes one weight from another, whichever are wanted.
    """
    groups = [[name] for name in scores] if by_tensor and largest else [list(scores)]
    open_groups = [group for group in groups if not _is_settled(group, scores, packed, largest)]
    if not open_groups:
        return
    counts = _counts({name: scores[name] for group in open_groups for name in group}, packed)
    zeros = [name for name, count in counts.items() if count.total and count.zero == count.total]
    if len(open_groups) == len(groups) and all(count.zero == count.total for count in counts.values()):
        raise ValueError(_all_zero(list(scores)))
    of_groups = [Counts(*map(sum, zip(*(counts[name] for name in group), strict=True))) for group in open_groups]
    short = [count for count in of_groups if count.kept_zeros] if largest else []
    if short:
        where = f" in {len(short)} of {len(groups)} tensors" if by_tensor else ""
        warnings.warn(_kept_zeros(where, short, zeros), stacklevel=4)  # of ChildNetwork's caller


# ---- The counts ----------------------------------------------------------------------------------------------------


def _is_settled(
    group: Iterable[str], scores: Mapping[str, Tensor], packed: Mapping[str, PackedMask], largest: bool
) -> bool:
    """Returns whether a few scores tell that, among weights that a share is chosen of, no kept one has a score of 0.

    It waits for a GPU once for each tensor that it looks at. What this rank alone holds tells nothing.
    """
    if any(is_sharded(scores[name]) for name in group):
        return False
    some_left = any(packed[name].count < packed[name].numel for name in group)
    for name in group:
        some = _first_rows(scores[name])
        if largest and some_left:
            mask = packed[name].bits[: -(-some.numel() // BLOCK) * BLOCK // 8]
            found = (some > 0).logical_and_(unpack(mask, some.shape).logical_not_())
        else:
            found = some != 0
        if found.any():
            return True
    return False


def _first_rows(scores: Tensor) -> Tensor:
    """Returns the first scores of a tensor, flat: a view, or a copy of no more than a few rows."""
    if scores.dim() == 0 or scores.numel() == 0:
        return scores.detach().reshape(-1)
    row = scores.numel() // len(scores)
    return scores.detach()[: -(-_SAMPLE // row)].reshape(-1)[:_SAMPLE]


def _counts(scores: Mapping[str, Tensor], packed: Mapping[str, PackedMask]) -> dict[str, Counts]:
    """Counts in one pass; each GPU is waited for once, and there is one collective for each way of being cut."""
    own: dict[str, Any] = {name: _own(tensor) for name, tensor in scores.items()}
    found = numbers([torch.count_nonzero(some) for tensor in own.values() for some in (tensor > 0, tensor == 0)])
    counted = dict(zip(own, zip(found[::2], found[1::2], strict=True), strict=True))
    sharded = {name: tensor for name, tensor in scores.items() if is_sharded(tensor)}
    if sharded:
        from ..ops.ranks import splits

        for split, names in splits(sharded).items():
            summed = split.sum(torch.tensor([counted[name] for name in names], dtype=torch.int64, device="cpu"))
            counted |= zip(names, map(tuple, summed.tolist()), strict=True)
    return {
        name: Counts(packed[name].numel, packed[name].count, int(above), int(zero))
        for name, (above, zero) in counted.items()
    }


def _own(tensor: Tensor) -> Any:
    """Returns what this rank holds of scores."""
    if not is_sharded(tensor):
        return tensor.detach()
    from ..ops.shards import local_tensor

    return local_tensor(tensor).detach()


# ---- The sentences -------------------------------------------------------------------------------------------------


def _all_zero(names: list[str]) -> str:
    return (
        "scores must not be 0 for all of the maskable weights, or a choice among them is by position alone (got only "
        f"zeros in {len(names)} tensors, the first '{names[0]}'); {_causes(names)}; or, under per_example=True, for a "
        "loss that compares the examples of a batch"
    )


def _kept_zeros(where: str, short: list[Counts], zeros: list[str]) -> str:
    total, kept, above, _ = map(sum, zip(*short, strict=True))
    chosen = sum(count.kept_zeros for count in short)
    of_tensors = "no tensor scores 0 as a whole"
    if zeros:
        shown = ", ".join(f"'{name}'" for name in zeros[:_SHOWN]) + (", ..." if len(zeros) > _SHOWN else "")
        of_tensors = f"{len(zeros)} tensors score 0 as a whole: {shown}"
    limit = min(count.above / count.total for count in short)
    remedy = f", or lower reserve_p to {_rounded_down(limit)}" if limit else ""
    return (
        f"ChildNetwork: more weights should have a score above 0 than are kept (got {kept:,} kept{where}, {above:,} of "
        f"{total:,} with a score above 0), so that {chosen:,} that score 0 are chosen by position alone; {of_tensors}; "
        f"{_causes(zeros)}; freeze what is not to be trained, or leave it to train in full by maskable={remedy}"
    )


def _causes(zeros: list[str]) -> str:
    """Returns what is to be looked for where whole tensors, of the given names, score 0."""
    if not zeros:
        return f"look for units that are never active, and {_UNDERFLOW}"
    found = []
    if any(map(_EXPERT.search, zeros)):
        found.append("experts that no token reached, which more batches may reach")
    if any(map(_LORA_A.search, zeros)):
        found.append("lora_A of a LoRA model that is not trained yet, whose gradient is 0 because lora_B is 0")
    found.append("weights outside of the loss or under no_grad")
    return f"look for {', for '.join(found)}, and {_UNDERFLOW}"


def _rounded_down(share: float) -> str:
    """Returns a share with three digits, no larger than it is."""
    digits = 2 - math.floor(math.log10(share))
    return f"{math.floor(share * 10**digits) / 10**digits:.3g}"
