"""Delta files: what turns a base model into the fine-tuned one, and nothing that the base has already.

For each masked parameter, the file holds the mask and the child network's values in the parameter's dtype. Another
parameter or buffer is stored in full if it differs from the base's or the base lacks it, else it is left out. For every
tensor of which values are left out, the description holds a digest of the base's values, so that a delta cannot be
applied to another base.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import FilePath
from ..ops.packed_mask import PackedMask
from . import files
from .files import check_shapes

_KIND = "delta"


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
        model: the fine-tuned model.
        base: the model before fine-tuning, or its state dict.
    """
    tuned = _tensors(model)
    before = base.state_dict() if isinstance(base, nn.Module) else base
    _check_outside(packed, tuned, before)
    contents: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name, tensor in tuned.items():
        if name in packed:
            mask = packed[name].to(tensor.device)
            contents[f"bits/{name}"] = mask.bits
            contents[f"values/{name}"] = mask.gather(tensor)
            digests[name] = _digest_outside(mask, tensor)
        elif name in before and _same_bits(tensor, before[name]):
            digests[name] = files.digest(tensor)
        else:
            contents[f"full/{name}"] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in tuned.items()}
    files.write(path, _KIND, contents, {"shapes": shapes, "base": digests})


def apply(path: FilePath, base_model: nn.Module) -> dict[str, PackedMask]:
    """Turns a base model into the fine-tuned one, as `ChildNetwork.apply_delta` documents; returns {name: mask}."""
    contents, description = files.read(path, _KIND)
    shapes = description["shapes"]
    tensors = _tensors(base_model)
    check_shapes(path, shapes, tensors)
    unknown = next((name for name in tensors if name not in shapes), None)
    if unknown is not None:
        raise ValueError(f"'{os.fspath(path)}' is for a model without '{unknown}'; it is of another model")
    packed = {n: PackedMask(shapes[n], contents[f"bits/{n}"]) for n in shapes if f"bits/{n}" in contents}
    for name, tensor in tensors.items():
        _check_base(path, name, tensor, packed, contents, description["base"])
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in packed:
                mask = packed[name].to(tensor.device).unpack()
                tensor.masked_scatter_(mask, contents[f"values/{name}"].to(tensor.device))
            elif f"full/{name}" in contents:
                tensor.copy_(contents[f"full/{name}"])
    return packed


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and saved buffers of a model by name, each tied one once."""
    saved = model.state_dict(keep_vars=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}


def _check_outside(packed: Mapping[str, PackedMask], tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a masked parameter's shape or dtype differs from the base's, or a weight outside changed."""
    moved = {}
    for name, mask in packed.items():
        for what, tensors in (("model", tuned), ("base", base)):
            if name not in tensors or tuple(tensors[name].shape) != mask.shape:
                raise ValueError(
                    f"save_delta: the {what} must have '{name}' of shape {mask.shape}, as the child network has (got "
                    f"{tuple(tensors[name].shape) if name in tensors else 'none'}); pass the ones it was made for"
                )
        if base[name].dtype != tuned[name].dtype:
            raise ValueError(
                f"save_delta: model and base must have one dtype (got {tuned[name].dtype} and {base[name].dtype} for "
                f"'{name}'); convert the base as the model was before training"
            )
        count = _moved_outside(mask, tuned[name], base[name])
        if count:
            moved[name] = count
    if moved:
        raise ValueError(
            "save_delta: weights outside the child network must be the base's, bit for bit (got "
            f"{sum(moved.values())} others in {len(moved)} tensors, the first in '{next(iter(moved))}'); the likely "
            "cause is training with decay='all', or another base"
        )


def _moved_outside(mask: PackedMask, tuned: Tensor, base: Tensor) -> int:
    """Returns how many weights outside the child network differ from the base's in any bit."""
    differs = files.raw(tuned) != files.raw(base)
    outside = ~mask.unpack().cpu().reshape(-1)
    return int((differs.view(tuned.numel(), tuned.element_size()).any(dim=1) & outside).sum())


def _digest_outside(mask: PackedMask, tensor: Tensor) -> str:
    return files.digest(tensor.masked_fill(mask.unpack(), 0))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(files.raw(a), files.raw(b))


def _check_base(
    path: FilePath,
    name: str,
    tensor: Tensor,
    packed: Mapping[str, PackedMask],
    contents: Mapping[str, Tensor],
    digests: Mapping[str, str],
) -> None:
    stored = contents.get(f"values/{name}", contents.get(f"full/{name}"))
    if stored is not None and stored.dtype != tensor.dtype:
        raise ValueError(
            f"'{os.fspath(path)}' has '{name}' in {stored.dtype} (got a model with {tensor.dtype}); convert the model "
            "to the dtype that the delta was made in"
        )
    if name not in digests:
        return
    found = _digest_outside(packed[name].to(tensor.device), tensor) if name in packed else files.digest(tensor)
    if found != digests[name]:
        raise ValueError(
            f"'{os.fspath(path)}' is for another base: '{name}' has other values there than in this model, which must "
            "be the base as it was before training; nothing has been written"
        )
