"""Files of child networks and deltas: safetensors files with a description, written whole or not at all.

A file's metadata holds its kind, a description in JSON, and a SHA-256 of the description and of every tensor with its
name, dtype and shape. Reading compares that digest, and so refuses damaged and foreign files. Any safetensors reader
can open the file.

The file of a child network holds each mask's bits by parameter name; its description has shapes and fingerprint.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import FilePath
from ..ops.packed_mask import PackedMask, fingerprint
from ..ops.tensor_parts import kind_of, parts, raw
from .names import renamed

_CHILD = "child network"  # the kind of file


def digest(tensor: Tensor) -> str:
    """Returns a SHA-256, in hexadecimal, of a tensor's dtype, shape and bits, in logical order.

    For a tensor that is not dense, that includes its kind and each tensor that holds its values.
    """
    found = hashlib.sha256(f"{kind_of(tensor)}{tensor.dtype} {tuple(tensor.shape)} ".encode())
    for name, part in parts(tensor).items():
        found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode() if name else b"")
        found.update(raw(part.cpu()).numpy().data)
    return found.hexdigest()


def write(path: FilePath, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes a file beside `path` and renames it, so that `path` never holds a part of a file.

    Args:
        path: the file to write; an existing one is replaced.
        kind: the kind of file, which `read` requires.
        tensors: {name: tensor}, on any devices.
        description: what else to store, such as shapes; JSON must be able to hold it.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    contents = {name: _own(tensor.detach().cpu()) for name, tensor in tensors.items()}
    metadata = _metadata(kind, json.dumps(description), contents)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb"):
            pass  # raises the usual OSError for a missing or read-only folder; safetensors would raise its own error
        save_file(contents, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: FilePath, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors, on the CPU and in memory of their own, and the description of a file that `write` made.

    Raises:
        ValueError: the file is damaged, or of another kind.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # raises the usual OSError for a missing or unreadable file; safetensors would raise its own error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("childtune_fast")
            contents = {name: file.get_tensor(name).clone() for name in file.keys()} if found == kind else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"'{os.fspath(path)}' must be a {kind} file of childtune_fast (got one that is truncated, altered or no "
            f"safetensors file at all: {error}); write it again"
        ) from None
    if found != kind:
        raise ValueError(
            f"'{os.fspath(path)}' must be a {kind} file of childtune_fast (got {found or 'another safetensors'} file)"
        )
    if metadata != _metadata(kind, metadata.get("description", ""), contents):
        raise ValueError(f"'{os.fspath(path)}' has been altered or damaged since it was written; write it again")
    return contents, json.loads(metadata["description"])


def _own(tensor: Tensor) -> Tensor:
    """Returns the tensor as safetensors can write it: in a storage of its own, in order, and not lazily conjugated."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _metadata(kind: str, description: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    parts = [description, *(f"{name} {digest(tensors[name])}" for name in sorted(tensors))]
    sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"format": "pt", "childtune_fast": kind, "description": description, "sha256": sha256}


# ---- Child networks ------------------------------------------------------------------------------------------------


def save_masks(path: FilePath, packed: Mapping[str, PackedMask]) -> None:
    """Writes the masks of a child network, {parameter name: mask}; raises OSError if the file cannot be written."""
    bits = {name: mask.bits for name, mask in packed.items()}
    shapes = {name: mask.shape for name, mask in packed.items()}
    write(path, _CHILD, bits, {"shapes": shapes, "fingerprint": fingerprint(packed.values())})


def load_masks(path: FilePath, params: Mapping[str, Tensor]) -> dict[str, PackedMask]:
    """Returns the masks in a file, {parameter name: mask}, by the names of a model that has the parameters `params`.

    Raises:
        ValueError: the file is damaged, of another kind, or for other parameters.
        OSError: the file cannot be read.
    """
    bits, description = read(path, _CHILD)
    bits, shapes = (renamed(of_file, params) for of_file in (bits, description["shapes"]))
    check_shapes(path, shapes, params)
    packed = {name: PackedMask(shapes[name], bits[name]) for name in params if name in shapes}
    if fingerprint(packed.values()) != description["fingerprint"]:
        raise ValueError(f"'{os.fspath(path)}' holds masks of another fingerprint than it says; write it again")
    return packed


def check_shapes(path: FilePath, shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the model's `tensors` include one of each name and shape in the file's `shapes`."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            got = f"one of shape {tuple(tensors[name].shape)}" if name in tensors else "none of that name"
            raise ValueError(
                f"'{os.fspath(path)}' is for a model with '{name}' of shape {tuple(shape)} (got {got}); it is of "
                "another model, or of this one in a wrapper that is not seen through, as those of torch.compile, DDP, "
                "FSDP and checkpointing are"
            )
