"""The rows of a step in which something is rounded stochastically: state of fewer bits, or parameters of 16 bits."""

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from ..arguments import is_sharded, resolved
from ..ops.packed_mask import Masks
from ..ops.step import StepKernels
from ..ops.step_group import MASK_FIELDS, SCALE_FIELDS, check_mask
from .kinds import is_rounded, kind_of
from .state import averages_of, begun


def add_rounded_rows(
    rows: MutableMapping[Any, list[tuple[Any, ...]]],
    group: dict[str, Any],
    first: int,
    amsgrad: bool,
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
) -> list[tuple[Tensor, Tensor, int]]:
    """Adds the rows of the parameters of a group with other `state` or `rounding` than the usual; see `collect`.

    Its small parameters, and those of 32 bits, may be usual ones. They have rows of their own.

    Args:
        rows: the group's rows, by what their parameters have in common, as `collect.Alike` says.
        group: the group.
        first: the number of its first parameter in the optimizer.
        amsgrad: whether it has amsgrad.
        states: the optimizer's state, as `collect` takes it.
        masks: the child network's masks, as `collect` takes them.
        kernels: the kernels that may step the parameters.
        undo: receives what the states were, as `collect` says.

    Returns:
        the group's sharded parameters (DTensor), which are left out, with their gradients and numbers.

    Raises:
        ValueError: a parameter is float64, or its state lacks an entry or is stored in another way.
    """
    sharded: list[tuple[Tensor, Tensor, int]] = []
    for i, param in enumerate(group["params"], first):
        grad = param.grad
        if grad is None:
            continue
        if type(param) is not Parameter and is_sharded(param):
            sharded.append((param, grad, i))
            continue
        grad = resolved(grad)
        kind = kind_of(group["state"], param)
        state, mask = begun(param, states, masks, amsgrad, kind, undo)
        averages, scales = averages_of(state, kind, amsgrad, param, i)
        row = (param, grad, *averages[:2], state["step"], i, *averages[2:], *scales)
        own_fields = SCALE_FIELDS[: len(scales)]
        if mask is not None:
            check_mask(mask, param)
            row = (*row, mask.bits, mask.offsets, mask.count)
            own_fields += MASK_FIELDS
        rounded = is_rounded(kind, group["rounding"], param)
        tensors = [param, grad, *averages, *scales]
        where = kernels.on_cpu if param.is_cpu else kernels.elsewhere(tensors, rounded)
        rows[where, own_fields, kind, group["rounding"] == "stochastic" and param.element_size() == 2].append(row)
    return sharded
