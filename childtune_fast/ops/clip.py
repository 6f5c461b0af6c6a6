"""What the host multiplies into the gradients' factor before a step: a GradScaler's scale, and the clip factor."""

from collections import defaultdict
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from ..arguments import as_float
from . import reference
from .squares import sums_of_squares
from .step_group import StepGroup

if TYPE_CHECKING:
    from .ranks import NormOverRanks


def unscale(groups: list[StepGroup], grad_scale: Tensor | float) -> None:
    """Divides the groups' `grad_factor` by a GradScaler's scale; raises ValueError if that is 0."""
    scale = as_float("grad_scale", grad_scale)
    if scale == 0:
        raise ValueError("ChildAdamW: grad_scale, which a GradScaler sets, must not be 0; construct the scaler anew")
    for group in groups:
        group.grad_factor /= scale


def clip(
    native: ModuleType | None,
    on_cpu: list[StepGroup],
    elsewhere: list[StepGroup],
    over_ranks: "NormOverRanks | None" = None,
    skip: bool = False,
) -> bool:
    """Multiplies the groups' clip factors into their `grad_factor`; reads the gradients once, writes none.

    Returns:
        Whether the step is to be skipped, on this rank or on one that holds other parts of the same parameters.
    """
    groups = on_cpu + elsewhere
    own: defaultdict[int, float] = defaultdict(float)
    for module, of_module in ((native, on_cpu), (None, elsewhere)):
        indices, grads, bits = _normed(of_module)
        for index, squares in zip(indices, sums_of_squares(module, grads, bits), strict=True):
            own[index] += squares
    if over_ranks is not None:
        skip = over_ranks.add(own, skip)
    squares = reference.in_turn(own[index] for index in sorted(own))
    for group in groups:
        if group.max_grad_norm is not None:
            # All groups' factors are the same, except for the sign, which maximize changes.
            group.grad_factor *= reference.clip_factor(group.max_grad_norm, squares, group.grad_factor)
            group.max_grad_norm = None  # so that no kernel clips again
    return skip


def _normed(groups: list[StepGroup]) -> tuple[list[int], list[Tensor], list[Tensor | None]]:
    """Returns of the gradients that the norm is of their parameters' numbers, them, and the masks of what counts."""
    indices: list[int] = []
    grads: list[Tensor] = []
    masks: list[Tensor | None] = []
    for group in groups:
        indices += group.indices
        grads += group.grads
        masks += group.child_bits if group.child_norm and group.child_bits else [None] * len(group.grads)
    return indices, grads, masks
