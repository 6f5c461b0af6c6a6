"""The state of one parameter from a checkpoint: found, cut and converted to what the parameter's group asks for."""

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, is_sharded, shown
from ..ops import codes as coding
from ..ops.codes import NEAREST, Codes, block_count, block_numbers
from ..ops.packed_mask import PackedMask
from ..ops.step_group import STORED_AS, State, compute_dtype
from .kinds import AVERAGES, CODED, is_coded, names_of
from .saved import check_bytes
from .state import copied, has_begun

_LEAST_SCALE, _MOST_SCALE = 32, 253  # of csrc/core/codes.h; 0 is that of zeros


def saved_mask(param: Tensor, bits: Any) -> PackedMask:
    """Returns the whole mask that a checkpoint holds of a parameter: packed, or bools, whole or cut in any way.

    Raises:
        ValueError: it is no tensor with values, or does not fit the parameter.
    """
    if not isinstance(bits, Tensor) or bits.is_meta or bits.layout != torch.strided:
        got = f"one of {bits.layout} on {bits.device}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"load_state_dict: state 'child_mask' must be a tensor with values (got {got})")
    bits = _whole(bits.detach())
    if bits.dtype != torch.bool:
        return PackedMask(param.shape, bits.to(param.device, copy=True))
    if bits.shape != param.shape:
        raise ValueError(
            f"load_state_dict: state 'child_mask' must have the parameter's shape {tuple(param.shape)} (got "
            f"{tuple(bits.shape)}); the checkpoint is damaged, or of another model"
        )
    return PackedMask.pack(bits.to(param.device))


def _whole(tensor: Tensor) -> Tensor:
    """Returns all of a DTensor, for which all ranks of its mesh must come here; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    from ..ops.shards import whole_tensor

    return whole_tensor(tensor)


def restored_state(
    param: Tensor, saved: dict[str, Any], mask: PackedMask | None, dense: bool, kind: State
) -> dict[str, Any]:
    """Returns a copy of a parameter's saved state, on the parameter's device, stored as its group asks for.

    Codes that stay codes, and floats that stay of their dtype, keep their values. Others are decoded, which is exact,
    or rounded to nearest.

    Args:
        param: the parameter.
        saved: its state in a checkpoint.
        mask: the parameter's mask, with which the state holds the child network's values alone; None without one.
        dense: whether the saved state is that of an optimizer without child network, whose values are gathered.
        kind: how the state is to be stored.

    Raises:
        TypeError: a value of the state cannot be copied.
        ValueError: a value of the state has another shape than the parameter, or its mask, requires, a scale is none,
            or the step count is none.
    """
    if not has_begun(saved):
        return {}
    own = (*AVERAGES, *CODED, "step", "child_mask")
    state = {k: copied(v, f"state {shown(k)}") for k, v in saved.items() if k not in own}
    step = saved.get("step", 0.0)
    dtype = torch.float64 if isinstance(step, Tensor) and step.dtype == torch.float64 else torch.float32
    state["step"] = torch.as_tensor(step, dtype=dtype, device="cpu").detach().clone().reshape(())
    count = state["step"].item()
    if not 0 <= count < math.inf or count != int(count):
        raise ValueError(f"load_state_dict: state 'step' must be a whole number of steps taken (got {count})")
    coded = is_coded(saved)
    keys = [key for key, name in zip(AVERAGES, names_of("8bit" if coded else "float32"), strict=True) if name in saved]
    if coded and kind == "8bit":
        for key in keys:
            state |= _restored_codes(key, saved, param, mask, dense)
        return state
    values = {key: _decoded(key, saved, param, mask) if coded else saved[key].detach() for key in keys}
    values = {key: _of_rank(key, v, param, mask, dense, saved.get("child_mask")) for key, v in values.items()}
    if kind == "8bit":
        return state | _encoded(values, param, mask)
    dtype = STORED_AS.get(kind, compute_dtype(param))
    for key, value in values.items():
        state[key] = _placed(value.to(device=param.device, dtype=dtype, copy=True), param, mask)
    return state


def _restored_codes(
    key: str, saved: dict[str, Any], param: Tensor, mask: PackedMask | None, dense: bool
) -> dict[str, Tensor]:
    """Returns copies of an average's codes and scales. A code does not depend on which others have its scale."""
    name = f"{key}_codes"
    codes = _of_rank(name, saved[name].detach(), param, mask, dense, saved.get("child_mask"))
    codes = codes.to(device=param.device, copy=True, memory_format=torch.contiguous_format)
    return _with_scales(key, codes, _scales(key, saved, param), param, mask)


def _scales(key: str, saved: dict[str, Any], param: Tensor, whole: bool = False) -> Tensor:
    """Returns a copy of the scales of a saved average, flat: of what the rank holds, or of the `whole` parameter."""
    what, scales = f"load_state_dict: state '{key}_scales'", saved[f"{key}_scales"].detach()
    required = block_count(param.numel())
    if scales.numel() != required:
        raise ValueError(
            f"{what} must have {required} values, for as many blocks (got shape {tuple(scales.shape)}); the checkpoint "
            "is damaged, or of another model"
        )
    if is_sharded(param) and not whole:
        from .placed import local_scales

        scales = local_scales(scales, param)
    else:
        scales = _whole(scales).reshape(-1)
    scales = scales.to(device=param.device, copy=True)
    if not bool(((scales == 0) | ((scales >= _LEAST_SCALE) & (scales <= _MOST_SCALE))).all()):
        raise ValueError(
            f"{what} must be 0, or lie in {_LEAST_SCALE} to {_MOST_SCALE} (got another one); the checkpoint is damaged"
        )
    return scales


def _decoded(key: str, saved: dict[str, Any], param: Tensor, mask: PackedMask | None) -> Tensor:
    """Returns the floats of a saved average that is in codes, whole, in the codes' shape."""
    codes = _whole(saved[f"{key}_codes"].detach()).to(param.device)
    child = None
    if codes.shape != param.shape:  # those of a child network, or damaged
        if "child_mask" in saved or is_sharded(param):
            mask = saved_mask(param, saved.get("child_mask"))
        required = tuple(param.shape) if mask is None else (mask.count,)
        if mask is None or codes.shape != required:
            raise ValueError(
                f"load_state_dict: state '{key}_codes' must have the shape {required} (got {tuple(codes.shape)}); the "
                "checkpoint is damaged, or of another model"
            )
        child = mask.unpack().reshape(-1).to(param.device)
    return _floats(key, Codes(codes.reshape(-1), _scales(key, saved, param, whole=True)), child).view(codes.shape)


def _floats(key: str, coded: Codes, child: Tensor | None = None) -> Tensor:
    """Returns the floats of codes: of all elements, or of those that are in a child network, a flat bool tensor."""
    numel = len(coded.codes) if child is None else len(child)
    blocks = block_numbers(numel, child, coded.codes.device)
    return coding.decode_average(coded, blocks) if key == AVERAGES[0] else coding.decode_square(coded, blocks)


def _encoded(values: dict[str, Tensor], param: Tensor, mask: PackedMask | None) -> dict[str, Tensor]:
    """Returns the codes and scales of what this rank holds of a state's averages, rounded to nearest."""
    flat = [value.to(device=param.device, dtype=torch.float32).reshape(-1) for value in values.values()]
    exp_avg, squares = coding.sanitize(flat[0], flat[1:])
    local: Tensor = param._local_tensor if is_sharded(param) else param
    child = None if mask is None else mask.unpack().reshape(-1).to(param.device)
    blocks, count = block_numbers(local.numel(), child, param.device), block_count(local.numel())
    coded = [coding.encode_average(exp_avg, blocks, count, NEAREST)]
    coded += [coding.encode_square(square, blocks, count, NEAREST) for square in squares]
    state: dict[str, Tensor] = {}
    for (key, value), (codes, scales) in zip(values.items(), coded, strict=True):
        state |= _with_scales(key, codes.view(value.shape), scales, param, mask)
    return state


def _with_scales(key: str, codes: Tensor, scales: Tensor, param: Tensor, mask: PackedMask | None) -> dict[str, Tensor]:
    """Returns the entries of a state for an average in codes, of which this rank holds these."""
    if mask is None and is_sharded(param):
        from .placed import scales_like

        scales = scales_like(scales, param)
    return {f"{key}_codes": _placed(codes, param, mask), f"{key}_scales": scales}


def _of_rank(key: str, value: Tensor, param: Tensor, mask: PackedMask | None, dense: bool, bits: Any) -> Tensor:
    """Returns what this rank needs of a saved value: all of it, its part, or the child network's values in that.

    The value may be dense, whole or cut in any way, or hold the child network's values alone. Then `bits`, the saved
    mask, must say for a sharded parameter where in the whole they are.
    """
    sharded = is_sharded(param)
    required = tuple(param.shape if mask is None or dense else (mask.whole_count,))
    if tuple(value.shape) == required != tuple(param.shape):
        if not sharded:
            return _whole(value)
        whole = saved_mask(param, bits)
        value = whole.scatter(_whole(value).to(whole.bits.device))  # torch may have cut it as it would a dense one
    elif value.shape != param.shape:
        raise ValueError(
            f"load_state_dict: state '{key}' must have the shape {required} (got {tuple(value.shape)}); the checkpoint "
            "is damaged, or of another model"
        )
    if is_sharded(param):
        from ..ops.shards import local_values

        value = local_values(value, param)
    else:
        value = _whole(value)
    return value if mask is None else mask.to(value.device).gather(value)


def _placed(value: Tensor, param: Tensor, mask: PackedMask | None) -> Tensor:
    """Returns a value as a DTensor that is placed as the parameter, where that is one and has no mask."""
    if mask is not None or not is_sharded(param):
        return value
    from ..ops.shards import dtensor_like

    return dtensor_like(value, param)


def dense_state(state: dict[str, Any], mask: PackedMask | None) -> dict[str, Any]:
    """Returns a parameter's state as without a child network, zeros outside it, in floats; {} before the first step."""
    if not has_begun(state):
        return {}
    dense = {k: v for k, v in state.items() if k not in ("child_mask", *CODED)}
    coded = is_coded(state)
    for key, name in zip(AVERAGES, names_of("8bit" if coded else "float32"), strict=True):
        if name not in state:
            continue
        value = state[name]
        if coded:
            value = _decoded_where_it_is(key, value, state.get(f"{key}_scales"), mask)
        elif mask is not None:
            check_type(f"dense_state_dict: state '{name}'", value, Tensor, "a tensor")
        dense[key] = value if mask is None or is_sharded(value) else mask.scatter(value)
    return dense


def _decoded_where_it_is(key: str, codes: Any, scales: Any, mask: PackedMask | None) -> Tensor:
    """Returns the floats of codes, in their shape; of a DTensor, which is dense, with zeros outside the mask."""
    sharded = isinstance(codes, Tensor) and is_sharded(codes)
    local: Any = codes._local_tensor if sharded else codes
    scales = scales._local_tensor if sharded and is_sharded(scales) else scales
    for what, value in (("codes", local), ("scales", scales)):
        check_bytes(value, f"dense_state_dict: state '{key}_{what}'")
    child = None if mask is None else mask.unpack()
    compact = child is not None and not sharded
    numel = local.numel() if child is None else child.numel()
    if scales.numel() != block_count(numel) or (mask is not None and compact and local.shape != (mask.count,)):
        raise ValueError(
            f"dense_state_dict: state '{key}_codes' must be those of the parameter, and '{key}_scales' one for each "
            f"128 weights (got the shapes {tuple(local.shape)} and {tuple(scales.shape)}); load a whole checkpoint"
        )
    coded = Codes(local.reshape(-1), scales.reshape(-1))
    values = _floats(key, coded, child.reshape(-1) if child is not None and compact else None).view(local.shape)
    if not sharded:
        return values
    from ..ops.shards import dtensor_like

    return dtensor_like(values if child is None else torch.where(child, values, 0.0), codes)
