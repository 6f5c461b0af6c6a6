"""What one step does to parameters of one group: the struct that every backend's `step` takes, and its requirements.

The compiled step checks its tensors by itself, in a few nanoseconds and without sentences. `check_group` runs when the
compiled step has refused a group, and before every step in torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..arguments import is_wrapper, lost_memory, shown
from .codes import block_count
from .packed_mask import PackedMask

# A float32 counts no further: 2**24 + 1 rounds to 2**24, and F would draw the same mask from then on.
_STEP_LIMITS = {
    torch.float32: (2**24, "2**24, as far as float32 counts, or a float64 tensor to go on"),
    torch.float64: (2**32 - 1, "2**32 - 1"),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

State = Literal["float32", "bfloat16", "8bit"]  # how state is stored; "float32": in the type that computes
STORED_AS = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}  # else compute_dtype
MASK_FIELDS = ("child_bits", "child_offsets", "child_counts")  # those of a StepGroup that say where it is masked
SCALE_FIELDS = ("exp_avg_scales", "exp_avg_sq_scales", "max_exp_avg_sq_scales")  # those that only 8-bit state has


@dataclass(slots=True)
class StepGroup:
    """The parameters of a group that have a gradient, their state, and the group's hyper-parameters as plain numbers.

    The lists run in parallel: entry `i` of each belongs to the same parameter. csrc/python/step_items.h reads these
    names.
    """

    lr: float  # NaN if `lr_on_device` replaces it
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    grad_factor: float  # -1 if maximize, else 1; the host multiplies clip factor and 1 / GradScaler's scale into it
    keep_threshold: int  # round(reserve_p * 65536); 65536 keeps every weight
    published_code: bool  # variant="hf"
    seed: int  # determines the random masks; unsigned, 64 bits
    max_grad_norm: float | None  # limit of the norm; None does not clip, or the host has clipped already
    lr_on_device: Tensor | None = None  # the learning rate as a tensor on the GPU that steps the group
    capturable: bool = False  # a CUDA graph may replay the step
    decay_outside: bool = False  # decay weights outside the child network too
    child_norm: bool = False  # norm_of="child": leave the gradient outside the child network out of the norm
    stochastic: bool = False  # rounding="stochastic": of the parameters, where they are bfloat16 or float16
    state: State = "float32"  # how the state of all of these parameters is stored
    slices: list[tuple[int, int, int]] | None = None  # of shards: see LocalPart.pieces; None if places do not matter
    params: list[Tensor] = field(default_factory=list)  # float32, float64, bfloat16 or float16; any shape and strides
    grads: list[Tensor] = field(default_factory=list)  # the parameter's dtype and shape; never written
    # The parameter's shape or, where it is masked, [its weights in the child network]; float32, or float64 for float64.
    # Or bfloat16; or uint8, the codes of 8-bit state, contiguous, which have scales.
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)  # empty without amsgrad
    exp_avg_scales: list[Tensor] = field(default_factory=list)  # of 8-bit state: see codes.Codes; else empty
    exp_avg_sq_scales: list[Tensor] = field(default_factory=list)
    max_exp_avg_sq_scales: list[Tensor] = field(default_factory=list)  # empty without amsgrad
    steps: list[Tensor] = field(default_factory=list)  # [], float32 or float64: steps taken so far; counted up
    indices: list[int] = field(default_factory=list)  # the parameter's number in the optimizer, through all groups
    # The three fields of packed_mask.PackedMask; empty without a child network.
    child_bits: list[Tensor] = field(default_factory=list)  # uint8
    child_offsets: list[Tensor] = field(default_factory=list)  # int64
    child_counts: list[int] = field(default_factory=list)
    sharded: list[Tensor] = field(default_factory=list)  # the DTensors of which `params` are local parts; else empty


def compute_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's state and of its step's arithmetic: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_mask(mask: PackedMask, param: Tensor) -> None:
    """Raises ValueError if a parameter has another shape than when its mask was made."""
    if mask.whole_shape != param.shape:
        raise ValueError(
            f"ChildAdamW: a masked parameter must keep its shape {mask.whole_shape} (got {tuple(param.shape)}); make "
            "child network and optimizer after the model has its final shapes"
        )


def check_group(group: StepGroup) -> None:
    """Raises if a step over the group would be wrong or unsafe.

    Raises:
        RuntimeError: a sparse gradient (as torch.optim.AdamW raises).
        TypeError: a dtype that is not supported, or a thing that is no tensor.
        ValueError: shapes or devices that differ, a step count that is none, or a state that is stored in another way
            than the group's.
    """
    averages = [("exp_avg", group.exp_avgs), ("exp_avg_sq", group.exp_avg_sqs)]
    if group.amsgrad:
        averages.append(("max_exp_avg_sq", group.max_exp_avg_sqs))
    for i, (param, grad, step) in enumerate(zip(group.params, group.grads, group.steps, strict=True)):
        name = f"parameter {group.indices[i]} of shape {tuple(param.shape)}"
        _check_grad(name, param, grad)
        shape = tuple(param.shape) if not group.child_bits else (group.child_counts[i],)
        for (key, values), field_of_scales in zip(averages, SCALE_FIELDS):  # noqa: B905 - two or three
            if group.state == "8bit":
                _check_bytes(name, f"state '{key}_codes'", values[i], param, shape)
                scales = getattr(group, field_of_scales)[i]
                _check_bytes(name, f"state '{key}_scales'", scales, param, (block_count(param.numel()),))
            else:
                _check_average(name, key, values[i], param, group.state, shape)
        if group.child_bits:
            _check_memory(name, "the mask", group.child_bits[i])
            _check_memory(name, "the mask", group.child_offsets[i])
        _check_step(name, step)


def _check_average(name: str, key: str, value: Tensor, param: Tensor, state: State, shape: tuple[int, ...]) -> None:
    dtype = STORED_AS.get(state, compute_dtype(param))
    if isinstance(value, Tensor) and {value.dtype, dtype} == {torch.float32, torch.bfloat16}:
        raise other_state(f"state '{key}' of {name}", state, str(value.dtype).removeprefix("torch."))
    _check_like(name, f"state '{key}'", value, param, dtype, shape)


def other_state(what: str, state: str, got: str) -> ValueError:
    """Returns the error for state that has begun in another form than that of its group."""
    return ValueError(
        f"ChildAdamW: {what} must be stored as its group says, in {state} (got {got}); "
        "optimizer.load_state_dict(optimizer.state_dict()) converts it"
    )


def _check_bytes(name: str, what: str, values: Tensor, param: Tensor, shape: tuple[int, ...]) -> None:
    _check_like(name, what, values, param, torch.uint8, shape)
    if not values.is_contiguous():
        raise ValueError(f"ChildAdamW: {what} of {name} must be contiguous (got strides {values.stride()})")


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"ChildAdamW does not support sparse gradients, please consider SparseAdam instead, or sparse=False in the "
            f"embedding (got a gradient of layout {grad.layout} for {name})"
        )
    if param.dtype not in DTYPES:
        raise TypeError(
            f"ChildAdamW: parameters must be float32, float64, bfloat16 or float16 (got {param.dtype} for {name}); "
            "hold a complex one as torch.nn.Parameter(torch.view_as_real(x))"
        )
    shape = tuple(param.shape)
    _check_like(name, "the value", param, param, param.dtype, shape)
    _check_like(name, "the gradient", grad, param, param.dtype, shape)


def _check_like(
    name: str, what: str, tensor: Tensor, param: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"ChildAdamW: {what} of {name} must be a tensor (got {type(tensor).__name__})")
    if is_wrapper(tensor):  # kernels would read its own memory, and torch might step it otherwise than its class means
        raise TypeError(
            f"ChildAdamW: {what} of {name} must be a plain tensor or a DTensor (got {type(tensor).__name__}, which "
            "computes in its own way); freeze it, or step it by another optimizer"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"ChildAdamW: {what} of {name} must be a strided tensor (got {tensor.layout})")
    if tensor.dtype != dtype:
        remedy = "convert it with .to()" if dtype.is_floating_point else "load a whole checkpoint"
        raise TypeError(f"ChildAdamW: {what} of {name} must be {dtype} (got {tensor.dtype}); {remedy}")
    if tensor.shape != shape:
        raise ValueError(f"ChildAdamW: {what} of {name} must have the shape {shape} (got {tuple(tensor.shape)})")
    if tensor.device != param.device:
        raise ValueError(
            f"ChildAdamW: {what} of {name} must be on the parameter's device {param.device} (got {tensor.device}); "
            "move the model before the backward pass, and load_state_dict after moving it"
        )
    _check_memory(name, what, tensor)
    if what != "the gradient":
        _check_not_negated(name, what, tensor)


def _check_memory(name: str, what: str, tensor: Tensor) -> None:
    if lost_memory(tensor):
        raise ValueError(
            f"ChildAdamW: {what} of {name} has no memory any more, or not enough: its storage was freed or shrunk, as "
            "that of flattened parameters is between their uses; step when it is there"
        )


def _check_not_negated(name: str, what: str, tensor: Tensor) -> None:
    if tensor.is_neg():
        raise ValueError(f"ChildAdamW: {what} of {name} must not be a lazily negated view; assign resolve_neg() of it")


def _check_step(name: str, step: Tensor) -> None:
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        got = f"one of {step.numel()} {step.dtype}" if isinstance(step, Tensor) else shown(step)
        raise TypeError(f"ChildAdamW: state 'step' of {name} must be a tensor of one float32 or float64 (got {got})")
    _check_memory(name, "state 'step'", step)
    _check_not_negated(name, "state 'step'", step)
    value = step.item()
    limit, words = _STEP_LIMITS[step.dtype]
    if not 0 <= value < limit or value != int(value):
        raise ValueError(f"ChildAdamW: state 'step' of {name} must be a whole number below {words} (got {value})")


def written(groups: Iterable[StepGroup]) -> Iterator[Tensor]:
    """Returns the tensors that a step over the groups writes."""
    for group in groups:
        yield from (*group.params, *group.exp_avgs, *group.exp_avg_sqs, *group.max_exp_avg_sqs, *group.steps)
        yield from (*group.exp_avg_scales, *group.exp_avg_sq_scales, *group.max_exp_avg_sq_scales)
