"""Child networks in files: the masks' bits by parameter name; shapes and the fingerprint in the description."""

import os
from collections.abc import Mapping

from torch import Tensor

from . import tensor_file
from .packed_mask import PackedMask, fingerprint

_KIND = "child network"


def save(path: str | os.PathLike, packed: Mapping[str, PackedMask]) -> None:
    """Writes masks by parameter name."""
    bits = {name: mask.bits for name, mask in packed.items()}
    shapes = {name: mask.shape for name, mask in packed.items()}
    tensor_file.write(path, _KIND, bits, {"shapes": shapes, "fingerprint": fingerprint(packed.values())})


def load(path: str | os.PathLike, params: Mapping[str, Tensor]) -> dict[str, PackedMask]:
    """Reads masks for a model that has parameters `params`.

    Raises:
        ValueError: the file is damaged, of another kind, or for other parameters.
    """
    bits, description = tensor_file.read(path, _KIND)
    shapes = description["shapes"]
    check_shapes(path, shapes, params)
    packed = {name: PackedMask(shapes[name], bits[name]) for name in params if name in shapes}
    if fingerprint(packed.values()) != description["fingerprint"]:
        raise ValueError(f"'{os.fspath(path)}' holds masks of another fingerprint than it says; write it again")
    return packed


def check_shapes(path: str | os.PathLike, shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the model has, among `tensors`, one of each name and shape that the file speaks of."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            got = f"one of shape {tuple(tensors[name].shape)}" if name in tensors else "none of that name"
            raise ValueError(
                f"'{os.fspath(path)}' is for a model with '{name}' of shape {tuple(shape)} (got {got}); it is of "
                "another model, or of this one inside or outside a wrapper, such as torch.compile's, that changes names"
            )
