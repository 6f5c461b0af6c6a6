"""Delta files: what turns a base model into the fine-tuned one, and nothing that the base has already.

For each masked parameter, the file holds the mask and the child network's values in the parameter's dtype. Another
parameter or buffer is stored in full if it differs from the base's or the base lacks it, else it is left out. A sparse
or quantised one is stored as the dense tensors that hold its values. For every tensor of which values are left out, the
description holds a digest of the base's values, so that a delta cannot be applied to another base.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..arguments import FilePath, is_sharded, lost_memory
from ..ops.packed_mask import PackedMask
from ..ops.tensor_parts import REBUILT, kind_of, overwrite, parts, raw, same_bits
from ..ops.undisturbed import undisturbed
from . import delta_entries, files
from .delta_entries import Entry
from .files import check_shapes
from .names import renamed

_NAMED = 5  # tensors that an error names
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


@torch.no_grad()
def save(
    path: FilePath,
    packed: Mapping[str, PackedMask],
    model: nn.Module,
    base: nn.Module | Mapping[str, Tensor],
) -> None:
    """Writes what turns `base` into `model`, as `ChildNetwork.save_delta` documents.

    Args:
        path: the file to write.
        packed: {parameter name: mask} of the child network.
        model: the fine-tuned model; of one that averages another's weights, the average.
        base: the model before fine-tuning, or its state dict.
    """
    # Its count of averages is no part of the model that a delta is applied to.
    tuned = _tensors(model.module if isinstance(model, AveragedModel) else model)
    for what, tensors in (("model", tuned), ("base", _tensors(base) if isinstance(base, nn.Module) else base)):
        if sharded := _first_sharded(tensors):
            raise ValueError(
                f"save_delta: the {what} must have whole tensors (got a DTensor for '{sharded}'); gather a sharded "
                "model's with torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True, "
                "load them into a model that is not sharded, and pass that"
            )
    packed = renamed(packed, tuned)
    before = renamed(_tensors(base) if isinstance(base, nn.Module) else base, tuned)
    for what, tensors in (("model", tuned), ("base", {name: before[name] for name in tuned if name in before})):
        _check_values(f"save_delta: the {what}", tensors)
    _check_memory(packed, tuned, before)
    _check_outside(packed, tuned, before)
    left_out = _left_out({name: tensor for name, tensor in tuned.items() if name not in packed}, before)
    contents: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name, tensor in tuned.items():
        if name in packed:
            mask = packed[name].to(tensor.device)
            contents[f"bits/{name}"] = mask.bits
            contents[f"values/{name}"] = mask.gather(_integers(tensor)).view(tensor.dtype)
            digests[name] = _digest_outside(mask, tensor)
        elif name in left_out:
            digests[name] = files.digest(tensor)
        else:
            contents |= {f"full.{part}/{name}" if part else f"full/{name}": t for part, t in parts(tensor).items()}
    description: dict[str, Any] = {"shapes": {n: tuple(t.shape) for n, t in tuned.items()}, "base": digests}
    kinds = {name: kind for name, tensor in tuned.items() if (kind := kind_of(tensor))}
    files.write(path, files.DELTA, contents, {**description, "kinds": kinds} if kinds else description)


@torch.no_grad()
def apply(path: FilePath, base_model: nn.Module) -> dict[str, PackedMask]:
    """Turns a base model into the fine-tuned one, as `ChildNetwork.apply_delta` documents; returns {name: mask}."""
    tensors = _tensors(base_model)
    if sharded := _first_sharded(tensors):
        raise ValueError(
            f"apply_delta: the base model must have whole tensors (got a DTensor for '{sharded}'); apply the delta "
            "before the model is sharded"
        )
    contents, description = files.read(path, files.DELTA)
    shapes = files.shapes_in(path, description)
    entries = renamed(delta_entries.entries(path, shapes, contents, description), tensors)
    check_shapes(path, renamed(shapes, tensors), tensors)
    if unknown := next((name for name in tensors if name not in entries), None):
        raise ValueError(f"'{os.fspath(path)}' is for a model without '{unknown}'; it is of another model")
    _check_values("apply_delta: the base model", tensors)
    params = dict(base_model.named_parameters())
    for name, tensor in tensors.items():
        if entries[name].mask is not None and name not in params:
            files.refuse(path, "masks of parameters only", f"one of the buffer {name!r}")
        check_base(path, name, tensor, entries[name])
    with undisturbed():  # all is checked
        for name, tensor in tensors.items():
            _write(tensor, entries[name])
    return {name: of_it for name in tensors if (of_it := entries[name].mask) is not None}


def _write(tensor: Tensor, entry: Entry) -> None:
    """Gives a tensor the values that a delta has of it."""
    if entry.mask is not None and entry.values is not None:
        mask, values = entry.mask.to(tensor.device).unpack(), entry.values.to(tensor.device)
        overwrite(tensor, _integers(tensor).masked_scatter(mask, _integers(values)).view(tensor.dtype))
    elif entry.full is not None:
        overwrite(tensor, entry.full.to(tensor.device))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and saved buffers of a model by name, each tied one once."""
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in unsaved}
    return {**dict(model.named_parameters()), **buffers}


def _first_sharded(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if is_sharded(tensor)), None)


def _check_values(whose: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor has lost the memory of its values: torch would crash as it reads or writes it."""
    for name, tensor in tensors.items():
        if lost_memory(tensor) or any(map(lost_memory, parts(tensor).values() if _readable(tensor) else ())):
            raise ValueError(f"{whose} must have memory for its values (got '{name}', whose storage was freed)")


def _check_memory(packed: Mapping[str, PackedMask], tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the base has a trainable tensor in the model's memory, where training changed it too."""
    for name, tensor in tuned.items():
        trained = tensor.requires_grad and (name not in packed or packed[name].count > 0)
        if trained and name in base and same_memory(tensor, base[name]):
            raise ValueError(
                f"save_delta: the base must have memory of its own for what was trained (got '{name}' in the model's, "
                "where training has changed it too, as in a state dict that was not copied); pass a copy that was made "
                "before training, such as copy.deepcopy's, or the pretrained model loaded anew"
            )


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Returns whether two dense tensors begin at the same place in memory."""
    if kind_of(a) or kind_of(b) or not a.numel():
        return False
    return (a.device, a.data_ptr()) == (b.device, b.data_ptr())


def _check_outside(packed: Mapping[str, PackedMask], tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a masked parameter is of another form than the base's, or a weight outside changed."""
    moved = []
    for name, mask in packed.items():
        for what, tensors in (("model", tuned), ("base", base)):
            if name not in tensors or tuple(tensors[name].shape) != mask.shape:
                raise ValueError(
                    f"save_delta: the {what} must have '{name}' of shape {mask.shape}, as the child network has (got "
                    f"{tuple(tensors[name].shape) if name in tensors else 'none'}); pass the ones it was made for"
                )
            if kind := kind_of(tensors[name]):
                raise ValueError(
                    f"save_delta: masked parameters of the {what} must be dense tensors with values (got '{name}', "
                    f"{kind}); load its values, or make it dense"
                )
        if base[name].dtype != tuned[name].dtype:
            raise ValueError(
                f"save_delta: model and base must have one dtype (got {tuned[name].dtype} and {base[name].dtype} for "
                f"'{name}'); convert the base as the model was before training"
            )
        moved += [f"{text} in '{name}'" for text in _moved_outside(mask, tuned[name], base[name])]
    if moved:
        more = f", and in {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
        raise ValueError(
            f"save_delta: weights outside the child network must be the base's, bit for bit (got {len(moved)} tensors "
            f"with others: {', '.join(moved[:_NAMED])}{more}); likely causes are an average of the weights, such as "
            "EMA or SWA, which rounds also those that never train, decay='all', another base, or another child network"
        )


def _moved_outside(mask: PackedMask, tuned: Tensor, base: Tensor) -> list[str]:
    """Returns a text that says how many weights outside the child network differ from the base's and how; or none."""
    tuned, base = tuned.cpu(), base.cpu()
    differs = (raw(tuned) != raw(base)).view(tuned.numel(), tuned.element_size()).any(dim=1)
    differs &= ~mask.unpack().cpu().reshape(-1)
    if not differs.any():
        return []
    now, before = (t.reshape(-1)[differs] for t in (tuned, base))
    by = (now - before if now.is_complex() else now.double() - before.double()).abs()
    known = by[~by.isnan()]
    texts = [f"{len(known)} by up to {known.max():.3g}"] if len(known) else []
    texts += [f"{len(by) - len(known)} by a NaN"] if len(known) < len(by) else []
    return [" and ".join(texts)]


def _left_out(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> set[str]:
    """Returns the names of the tensors that the base has to the bit; raises ValueError if another cannot be stored."""
    found = set()
    for name, tensor in tuned.items():
        if name in base and _readable(tensor) and same_bits(tensor, base[name]):
            found.add(name)
        elif not _storable(tensor):
            raise ValueError(
                "save_delta: what differs from the base's must be dense, sparse or quantised, with values that "
                f"safetensors can hold (got '{name}', {kind_of(tensor) or 'dense'}, {tensor.dtype}, "
                f"{'that differs' if name in base else 'that the base lacks'}); convert it in model and base"
            )
    return found


def _readable(tensor: Tensor) -> bool:
    try:
        return parts(tensor) is not None
    except TypeError:
        return False


def _storable(tensor: Tensor) -> bool:
    if kind_of(tensor) not in REBUILT or not _readable(tensor):
        return False
    return all(files.can_hold(part.dtype) for part in parts(tensor).values())


def _digest_outside(mask: PackedMask, tensor: Tensor) -> str:
    return files.digest(_integers(tensor).masked_fill(mask.unpack(), 0).view(tensor.dtype))


def _integers(tensor: Tensor) -> Tensor:
    """Returns a dense tensor's bits as integers, which torch can select and fill also where it cannot the tensor's."""
    integers = _INTEGERS.get(tensor.element_size())
    return tensor if integers is None else tensor.resolve_conj().resolve_neg().view(integers)


def check_base(path: FilePath, name: str, tensor: Tensor, entry: Entry) -> None:
    """Raises ValueError unless a tensor is of the kind and dtype in the file, and has what the file leaves out."""
    stored = entry.full if entry.values is None else entry.values
    for of_file, of_model, what in (
        (entry.kind or "dense", kind_of(tensor) or "dense", "kind"),
        (tensor.dtype if stored is None else stored.dtype, tensor.dtype, "dtype"),
    ):
        if of_file != of_model:
            raise ValueError(
                f"'{os.fspath(path)}' has '{name}' in {of_file} (got a model with {of_model}); convert the model "
                f"to the {what} that the delta was made in"
            )
    if entry.digest is None:
        return
    if not _readable(tensor):
        files.refuse(path, "digests of values that can be read", f"one for '{name}', {entry.kind}")
    found = files.digest(tensor) if entry.mask is None else _digest_outside(entry.mask.to(tensor.device), tensor)
    if found != entry.digest:
        raise ValueError(
            f"'{os.fspath(path)}' is for another base: '{name}' has other values there than in this model, which must "
            "be the base as it was before training; nothing has been written"
        )
