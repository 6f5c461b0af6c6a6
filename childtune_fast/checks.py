"""What the optimizer requires of its options and tensors, and the sentences that users get when it does not hold.

The compiled step checks its tensors by itself, in a few nanoseconds and without sentences; `check_group` runs when it
has refused, and before every step of the fallback.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .mask import keep_threshold
from .packed_mask import PackedMask
from .step_group import StepGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_type(what: str, value: Any, kind: type | tuple[type, ...], noun: str) -> None:
    """Raises TypeError unless an argument is of its kind; the sentence is "`what` must be `noun`"."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {noun} (got {type(value).__name__})")


def check_model(model: Any, what: str = "model") -> None:
    """Raises TypeError unless an argument is a module."""
    check_type(what, model, nn.Module, "a torch.nn.Module")


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype that a parameter's step computes in, and that its state has: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_options(group: dict[str, Any], seed: int) -> None:
    """Raises for options of a group that this class adds to AdamW's, or cannot honour."""
    keep_threshold(group["reserve_p"])
    if group["seed"] != seed:
        raise ValueError("ChildAdamW: seed is one for the whole optimizer; pass it to the constructor, not in a group")
    if group["decay"] not in ("auto", "all", "child"):
        raise ValueError(f"decay must be 'auto', 'all' or 'child' (got {group['decay']!r})")
    if group["norm_of"] not in ("all", "child"):
        raise ValueError(f"norm_of must be 'all' or 'child' (got {group['norm_of']!r})")
    if group["variant"] not in ("torch", "hf"):
        raise ValueError(f"variant must be 'torch' or 'hf', the published code's arithmetic (got {group['variant']!r})")
    if group["variant"] == "hf" and group["amsgrad"]:
        raise ValueError("variant='hf' has no amsgrad; use amsgrad=False or variant='torch'")
    max_grad_norm = group["max_grad_norm"]
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be a number above 0, or None for no clipping (got {max_grad_norm!r})")
    if group["differentiable"]:
        raise ValueError("ChildAdamW cannot be differentiated through; use torch.optim.AdamW(differentiable=True)")


def check_mask(mask: PackedMask, param: Tensor) -> None:
    """Raises ValueError if a parameter has got another shape since its mask was made."""
    if mask.shape != param.shape:
        raise ValueError(
            f"ChildAdamW: a masked parameter must keep its shape {mask.shape} (got {tuple(param.shape)}); make child "
            "network and optimizer after the model has its final shapes"
        )


def check_group(group: StepGroup) -> None:
    """Raises if a step over the group would be wrong or unsafe.

    Raises:
        RuntimeError: a sparse gradient (as torch.optim.AdamW raises).
        TypeError: a dtype that is not supported, or a thing that is no tensor.
        ValueError: shapes or devices that differ, or a step count that is none.
    """
    states = {"exp_avg": group.exp_avgs, "exp_avg_sq": group.exp_avg_sqs}
    if group.amsgrad:
        states["max_exp_avg_sq"] = group.max_exp_avg_sqs
    for i, (param, grad, step) in enumerate(zip(group.params, group.grads, group.steps, strict=True)):
        name = f"parameter {group.indices[i]} of shape {tuple(param.shape)}"
        _check_grad(name, param, grad)
        shape = tuple(param.shape) if not group.child_bits else (group.child_counts[i],)
        for key, values in states.items():
            _check_like(name, f"state '{key}'", values[i], param, compute_dtype(param), shape)
        _check_step(name, step)


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"ChildAdamW does not support sparse gradients, please consider SparseAdam instead, or sparse=False in the "
            f"embedding (got a gradient of layout {grad.layout} for {name})"
        )
    if param.dtype not in _DTYPES:
        raise TypeError(
            f"ChildAdamW: parameters must be float32, float64, bfloat16 or float16 (got {param.dtype} for {name}); for "
            "complex ones pass torch.view_as_real of them"
        )
    shape = tuple(param.shape)
    _check_like(name, "the value", param, param, param.dtype, shape)
    _check_like(name, "the gradient", grad, param, param.dtype, shape)


def _check_like(
    name: str, what: str, tensor: Tensor, param: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"ChildAdamW: {what} of {name} must be a tensor (got {type(tensor).__name__})")
    if tensor.layout != torch.strided:
        raise TypeError(f"ChildAdamW: {what} of {name} must be a strided tensor (got {tensor.layout})")
    if tensor.dtype != dtype:
        raise TypeError(f"ChildAdamW: {what} of {name} must be {dtype} (got {tensor.dtype}); convert it with .to()")
    if tensor.shape != shape:
        raise ValueError(f"ChildAdamW: {what} of {name} must have the shape {shape} (got {tuple(tensor.shape)})")
    if tensor.device != param.device:
        raise ValueError(
            f"ChildAdamW: {what} of {name} must be on the parameter's device {param.device} (got {tensor.device}); "
            "move the model before the backward pass, and load_state_dict after moving it"
        )
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"ChildAdamW: {what} of {name} has no memory any more; its storage was resized to 0")


def _check_step(name: str, step: Tensor) -> None:
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"ChildAdamW: state 'step' of {name} must be a tensor of one float32 or float64 (got {step!r})")
    value = step.item()
    if not 0 <= value < 2**32 - 1 or value != int(value):
        raise ValueError(f"ChildAdamW: state 'step' of {name} must be a whole number below 2**32 - 1 (got {value})")


def check_no_lazy_negation(params: list[Tensor]) -> None:
    """Raises ValueError for a lazily negated view of a complex tensor: its memory holds the opposite of its values."""
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
    """Device, first and last byte of a parameter; None for one without memory of its own."""
    if param.numel() == 0 or param.layout != torch.strided or param.device.type == "meta":
        return None
    begin = param.data_ptr()
    extent = 1 + sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
    return str(param.device), begin, begin + extent * param.element_size(), param


def _check_cluster(cluster: list[tuple[str, int, int, Tensor]]) -> None:
    """Counts, for parameters whose spans of memory overlap, how often each element of the memory is used."""
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
    """Whether no element is stored twice; a sufficient test: no stride falls into the dimensions with smaller ones."""
    reach = 0
    for stride, n in sorted(zip(param.stride(), param.shape, strict=True)):
        if n > 1 and stride <= reach:
            return False
        reach += (n - 1) * stride
    return True
