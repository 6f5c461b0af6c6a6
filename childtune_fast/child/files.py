"""Files of child networks and deltas: safetensors files with a description, written whole or not at all.

A file's metadata holds its kind, a description in JSON, and a SHA-256 of the description and of every tensor with its
name, dtype and shape. Reading compares that digest, and so refuses damaged and foreign files. Any safetensors reader
can open the file. It is read by safetensors, and written here: safetensors puts metadata in random order, so that equal
contents would make different files, and writes under a name and with permissions of its own.

The file of a child network holds each mask's bits by parameter name; its description has shapes and fingerprint.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from ..arguments import FilePath, check_type
from ..ops.packed_mask import PackedMask, fingerprint
from ..ops.tensor_parts import kind_of, parts, raw
from ..whole_file import written
from .names import renamed

_RESERVED = "__metadata__"  # what a safetensors file calls its metadata, and so cannot call a tensor
CHILD, DELTA, SCORES = "child network", "delta", "Fisher scores"  # the kinds of file


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
    """Writes a file, whole or not at all; equal contents make equal bytes.

    It goes tensor by tensor, so that of those on another device no more than one at a time is copied.

    Args:
        path: the file to write; an existing one is replaced.
        kind: the kind of file, which `read` requires.
        tensors: {name: dense tensor}, on any devices.
        description: what else to store, such as shapes; JSON must be able to hold it.

    Raises:
        ValueError: safetensors could not read a name back.
        OSError: the file cannot be written.
    """
    check_type("path", path, (str, os.PathLike), "a path")  # a number would be a file of the caller's, and be closed
    for name in tensors:
        if name == _RESERVED or not _is_text(name):
            raise ValueError(
                f"names of parameters must be texts that a safetensors file can hold, and not '{_RESERVED}', which has "
                f"another meaning there (got {name!r}); rename the parameter"
            )
    # Wide dtypes first, as safetensors does it: each tensor then starts at a multiple of its dtype's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header: dict[str, Any] = {_RESERVED: _metadata(kind, json.dumps(description, sort_keys=True), ordered)}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {**_form(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(raw(tensor.detach().cpu()).numpy().data)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def can_hold(dtype: torch.dtype) -> bool:
    """Returns whether a file can hold tensors of a dtype."""
    try:
        return bool(_form(torch.empty(0, dtype=dtype, device="cpu")))
    except KeyError:
        return False


def _form(tensor: Tensor) -> dict[str, Any]:
    """Returns the names of a tensor's dtype and shape in safetensors' own words.

    Raises:
        KeyError: safetensors does not know the dtype.
    """
    from safetensors.torch import save

    empty = torch.empty(0, *tensor.shape, dtype=tensor.dtype, device="cpu")
    form = json.loads(save({"": empty})[8:])[""]
    return {"dtype": form["dtype"], "shape": form["shape"][1:]}


def read(path: FilePath, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors, on the CPU and in memory of their own, and the description of a file that `write` made.

    The description is a mapping; what it holds remains to be checked.

    Raises:
        ValueError: the file is damaged, or of another kind.
        OSError: the file cannot be read.
    """
    from safetensors import safe_open

    check_type("path", path, (str, os.PathLike), "a path")
    try:
        # Raises the usual OSError, where safetensors would raise its own. It opens a file twice, by name.
        with open(path, "rb") as opened, safe_open(_name_of(opened, path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("childtune_fast")
            contents = {name: file.get_tensor(name).clone() for name in file.keys()} if found == kind else {}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:  # safetensors' own, and torch's of shapes and dtypes that it cannot make
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
    try:
        description = json.loads(metadata["description"])
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        refuse(path, "a description that is a mapping", "none")
    return contents, description


def kind_in(path: FilePath) -> str:
    """Returns the kind of file that one says it is: `CHILD`, `DELTA` or `SCORES`.

    Raises:
        ValueError: it is none of these.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # raises the usual OSError
        pass
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("childtune_fast")
    except SafetensorError:
        found = None
    if found not in (CHILD, DELTA, SCORES):
        raise ValueError(
            f"'{os.fspath(path)}' must be a {CHILD}, {DELTA} or {SCORES} file of childtune_fast (got another, or a "
            "damaged one)"
        )
    return found


def _name_of(file: BinaryIO, path: FilePath) -> FilePath:
    """Returns a name by which an open file can be opened again, although another may have taken its place at `path`."""
    name = f"/proc/self/fd/{file.fileno()}"
    return name if os.path.exists(name) else path  # only Linux has such names


def _metadata(kind: str, description: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    parts = [description, *(f"{name} {digest(tensors[name])}" for name in sorted(tensors))]
    sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"format": "pt", "childtune_fast": kind, "description": description, "sha256": sha256}


# ---- Contents that are as they were written, and yet wrong ---------------------------------------------------------


def refuse(path: FilePath, required: str, got: str) -> NoReturn:
    """Raises ValueError: a file has the right digest, and does not hold what its kind must."""
    raise ValueError(
        f"'{os.fspath(path)}' must hold {required} (got {got}); what wrote it has a fault: write it again with this "
        "library"
    )


def shapes_in(path: FilePath, description: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of a file's description; raises ValueError if it is not that."""
    shapes = description.get("shapes")
    if not isinstance(shapes, dict):
        refuse(path, "shapes by name", type(shapes).__name__)
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            refuse(path, "shapes that are lists of sizes", f"{shape!r:.80} for {name!r}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def mask_in(path: FilePath, name: str, shape: Sequence[int], bits: Tensor) -> PackedMask:
    """Returns the mask of one parameter in a file; raises ValueError if its bits do not fit."""
    try:
        return PackedMask(shape, bits)
    except ValueError as error:
        got = str(error)
    refuse(path, f"the bits of a mask for {name!r}", got)


# ---- Child networks ------------------------------------------------------------------------------------------------


def save_masks(path: FilePath, packed: Mapping[str, PackedMask]) -> None:
    """Writes the masks of a child network, {parameter name: mask}.

    Raises:
        ValueError: a parameter has a name that safetensors cannot hold.
        OSError: the file cannot be written.
    """
    bits = {name: mask.bits for name, mask in packed.items()}
    shapes = {name: mask.shape for name, mask in packed.items()}
    write(path, CHILD, bits, {"shapes": shapes, "fingerprint": fingerprint(packed.values())})


def load_masks(path: FilePath, params: Mapping[str, Tensor]) -> dict[str, PackedMask]:
    """Returns the masks in a file, {parameter name: mask}, by the names of a model that has the parameters `params`.

    Raises:
        ValueError: the file is damaged, of another kind, or for other parameters.
        OSError: the file cannot be read.
    """
    bits, description = read(path, CHILD)
    shapes = shapes_in(path, description)
    if alone := sorted(bits.keys() ^ shapes.keys()):
        refuse(path, "a shape and a mask for each parameter", f"one of the two for {alone[0]!r}")
    masks = renamed({name: mask_in(path, name, shape, bits[name]) for name, shape in shapes.items()}, params)
    check_shapes(path, {name: mask.shape for name, mask in masks.items()}, params)
    packed = {name: masks[name] for name in params if name in masks}
    if fingerprint(packed.values()) != description.get("fingerprint"):
        raise ValueError(f"'{os.fspath(path)}' holds masks of another fingerprint than it says; write it again")
    return packed


def check_shapes(path: FilePath, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the model's `tensors` include one of each name and shape in the file's `shapes`."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            got = f"one of shape {tuple(tensors[name].shape)}" if name in tensors else "none of that name"
            raise ValueError(
                f"'{os.fspath(path)}' is for a model with {name!r} of shape {shape} (got {got}); it is of "
                "another model, or of this one in a wrapper that is not seen through, as those of torch.compile, DDP, "
                "FSDP and checkpointing are"
            )


# ---- Fisher scores -------------------------------------------------------------------------------------------------


def read_scores(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the scores in a file, {parameter name: tensor}, and what it says of them.

    Of a safetensors file that is not ours, all tensors are scores, and it says nothing.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kind = kind_in(path)
    except ValueError:
        kind = ""
    if kind:
        return read(path, SCORES)
    try:
        return load_file(path), {}
    except SafetensorError as error:
        raise ValueError(f"'{os.fspath(path)}' must hold scores by name in a safetensors file (got {error})") from None
