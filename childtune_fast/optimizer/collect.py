"""Turns the optimizer's parameters, state and options into the structs that `ops.step` takes."""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, float32, float64
from torch.nn import Parameter

from ..arguments import both_betas, check_flags, check_seed, is_sharded, number, shown
from ..ops.packed_mask import Masks, PackedMask
from ..ops.random_mask import KEEP_ALL, keep_threshold
from ..ops.step import StepKernels, Where
from ..ops.step_group import MASK_FIELDS, State, StepGroup, check_mask
from .groups import check_list, check_numbers
from .rows import AMSGRAD_FIELDS, FIELDS, Alike, Columns, unusual_columns
from .state import incomplete

if TYPE_CHECKING:
    from ..ops.ranks import NormOverRanks

Decay = Literal["auto", "all", "child"]
Variant = Literal["torch", "hf"]
NormOf = Literal["all", "child"]
Rounding = Literal["nearest", "stochastic"]
_DECAYS, _VARIANTS, _NORMS_OF, _STATES, _ROUNDINGS = map(get_args, (Decay, Variant, NormOf, State, Rounding))
# Of a group, besides reserve_p.
OWN_OPTIONS = ("decay", "variant", "max_grad_norm", "norm_of", "state", "rounding", "seed")
_OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable"),  # AdamW's
    *OWN_OPTIONS,
)
_LR_DTYPES = (float32, float64)  # dtypes of a learning rate that the kernels on a GPU can read


def collect(
    param_groups: list[dict[str, Any]],
    states: MutableMapping[Tensor, dict[str, Any]],
    masks: Masks | None,
    kernels: StepKernels,
    undo: dict[Tensor, dict[str, Any] | None],
) -> dict[Where, list[StepGroup]]:
    """Sorts the parameters that have a gradient by who steps them.

    Args:
        param_groups: the optimizer's parameter groups.
        states: {parameter: its state}, the optimizer's state. Where a state has not begun, this call begins it.
        masks: {parameter: mask} of the child network; None without one. Where this call begins a state, it moves the
            mask to its parameter's device.
        kernels: the kernels that may step the parameters.
        undo: receives, for each parameter whose state this call begins or extends, what the state was; None for none.

    Raises:
        ValueError: an option cannot be honoured, or a group or the state of a parameter lacks an entry.
        TypeError: an option, or a group's parameters, are of a kind that no step can take.
        BackendError: there are no kernels for a GPU, and they were asked for.
    """
    by_where: defaultdict[Where, list[StepGroup]] = defaultdict(list)
    reader, first = kernels.state_reader(states, masks), 0
    clips = any(group.get("max_grad_norm") is not None for group in param_groups)
    for group in param_groups:
        try:
            check_flags(group)
            fields = AMSGRAD_FIELDS if group["amsgrad"] else FIELDS
            params, state, rounding = group["params"], group["state"], group["rounding"]
            if type(params) is not list:
                check_list(params)
        except KeyError as error:
            raise incomplete(error) from error
        read = None
        if reader is not None and state == "float32" and rounding == "nearest":
            read = reader.read(params, first, fields is AMSGRAD_FIELDS)
        if read is not None:
            columns = _usual_columns(kernels.on_cpu, *read)
        else:
            check_storage(group)
            columns = unusual_columns(group, first, fields, states, masks, kernels, undo, clips)
        first += len(params)
        for alike, of_kind in columns.items():
            if of_kind[0]:
                target = _options(group, param_groups[0], masks is not None, alike.where)
                target.state, target.stochastic = alike.state, alike.stochastic
                _check_capturable(target, alike.where, kernels, of_kind[0][0])
                for field, column in zip(fields + alike.own_fields, of_kind, strict=True):
                    setattr(target, field, column)
                by_where[alike.where].append(target)
    return by_where


def _usual_columns(
    on_cpu: Where, plain: Sequence[list[Any]], masked: Sequence[list[Any]], masks: list[PackedMask]
) -> Columns:
    """Returns the columns of a group all of whose parameters the compiled reader knows."""
    for mask, param in zip(masks, masked[0], strict=True):
        check_mask(mask, param)
    of_masks = [mask.bits for mask in masks], [mask.offsets for mask in masks], [mask.count for mask in masks]
    return {Alike(on_cpu): plain, Alike(on_cpu, MASK_FIELDS): (*masked, *of_masks)}


def norm_over_ranks(param_groups: list[dict[str, Any]]) -> "AbstractContextManager[NormOverRanks | None]":
    """Returns the context of a step that has a norm over ranks; of None if no parameter is cut, or none has a limit."""
    if all(group.get("max_grad_norm") is None for group in param_groups):
        return contextlib.nullcontext()
    params = enumerate(itertools.chain.from_iterable(group["params"] for group in param_groups))
    cut = {i: param for i, param in params if type(param) is not Parameter and is_sharded(param)}
    if not cut:
        return contextlib.nullcontext()
    from ..ops.ranks import NormOverRanks

    return NormOverRanks(cut)


def _options(group: dict[str, Any], first_group: dict[str, Any], masked: bool, where: Where) -> StepGroup:
    """Returns a StepGroup of a group's options, without parameters; the first group has the optimizer's seed."""
    try:
        options = {name: group[name] for name in _OPTIONS}
        if not masked or "reserve_p" in group:  # which a user may have put there
            options["reserve_p"] = group["reserve_p"]
        seed = first_group["seed"]
    except KeyError as error:
        raise incomplete(error) from error
    check_options(options, seed)  # again, because a user may have changed them in `param_groups`
    lr, (beta1, beta2) = options["lr"], both_betas(options)
    on_its_gpu = (
        isinstance(lr, Tensor)
        and lr.is_cuda
        and lr.get_device() == where
        and lr.dtype in _LR_DTYPES
        and lr.numel() == 1
    )
    return StepGroup(
        lr=math.nan if on_its_gpu else number(options, "lr"),  # which would wait for the GPU
        lr_on_device=lr if on_its_gpu else None,
        capturable=bool(options["capturable"]),
        beta1=beta1,
        beta2=beta2,
        eps=number(options, "eps", least=0.0),
        weight_decay=number(options, "weight_decay", least=0.0),
        amsgrad=bool(options["amsgrad"]),
        grad_factor=-1.0 if options["maximize"] else 1.0,
        keep_threshold=KEEP_ALL if masked else keep_threshold(options["reserve_p"]),
        published_code=options["variant"] == "hf",
        seed=check_seed(options["seed"]),
        max_grad_norm=options["max_grad_norm"],
        decay_outside=options["decay"] == "all",
        child_norm=options["norm_of"] == "child",
    )


def _check_capturable(group: StepGroup, where: Where, kernels: StepKernels, first: Tensor) -> None:
    """Raises ValueError if a group has capturable=True, but no GPU steps its parameters, of which `first` is one."""
    if group.capturable and not isinstance(where, int):
        raise ValueError(
            "ChildAdamW: capturable=True needs parameters that the compiled kernels step on a GPU: contiguous, with "
            f"backend='auto' where the kernels have proved themselves (got one of shape {tuple(first.shape)} on "
            f"{first.device}, backend={kernels.backend!r}); use capturable=False"
        )


def check_values(group: dict[str, Any], seed: int | None) -> None:
    """Raises if a group that is new lacks an option, or one is invalid.

    Args:
        group: the group.
        seed: the optimizer's seed; None for that of the group itself.

    Raises:
        ValueError, TypeError: as `check_numbers` and `check_options` do, or an option is missing.
    """
    try:
        check_numbers(group)
        check_options(group, check_seed(group["seed"]) if seed is None else seed)
    except KeyError as error:
        raise incomplete(error) from error


def check_options(options: dict[str, Any], seed: int) -> None:
    """Raises if an option of a group is invalid; checks those that torch.optim.AdamW does not know or does not refuse.

    Args:
        options: the group's options; without `reserve_p` if there is a child network.
        seed: the optimizer's seed, which every group must have.

    Raises:
        ValueError: an option is out of its range or cannot be honoured.
        TypeError: `reserve_p` is no number.
    """
    if "reserve_p" in options:
        keep_threshold(options["reserve_p"])
    if not isinstance(options["seed"], int) or options["seed"] != seed:
        raise ValueError("ChildAdamW: seed is one for the whole optimizer; pass it to the constructor, not in a group")
    if options["decay"] not in _DECAYS:
        raise ValueError(f"decay must be 'auto', 'all' or 'child' (got {shown(options['decay'])})")
    if options["norm_of"] not in _NORMS_OF:
        raise ValueError(f"norm_of must be 'all' or 'child' (got {shown(options['norm_of'])})")
    if options["variant"] not in _VARIANTS:
        raise ValueError(
            f"variant must be 'torch' or 'hf', the published code's arithmetic (got {shown(options['variant'])})"
        )
    check_storage(options)
    if options["variant"] == "hf" and options["amsgrad"]:
        raise ValueError("variant='hf' has no amsgrad; use amsgrad=False or variant='torch'")
    max_grad_norm = options["max_grad_norm"]
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(
            f"max_grad_norm must be a number above 0, or None for no clipping (got {shown(max_grad_norm)})"
        )
    if options["differentiable"]:
        raise ValueError("ChildAdamW cannot be differentiated through; use torch.optim.AdamW(differentiable=True)")


def check_storage(options: Mapping[str, Any]) -> None:
    """Raises ValueError unless a group's `state` and `rounding` are words that are known."""
    if options["state"] not in _STATES:
        raise ValueError(f"state must be 'float32', 'bfloat16' or '8bit' (got {shown(options['state'])})")
    if options["rounding"] not in _ROUNDINGS:
        raise ValueError(
            "rounding, that of bfloat16 and float16 parameters, must be 'nearest' or 'stochastic' (got "
            f"{shown(options['rounding'])})"
        )


def settle_options(group: dict[str, Any], masked: bool) -> None:
    """Makes the options of a group with a child network show what its steps do: no reserve_p, and no "auto" decay."""
    if masked:
        group.pop("reserve_p", None)
        if group.get("decay") == "auto":
            group["decay"] = "child"
