"""Models in safetensors files, of which one tensor at a time is read: a file, a folder, or a name on the Hub."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..arguments import FilePath
from .layers import Source, of_tensors

_WEIGHTS = ("F64", "F32", "F16", "BF16")  # safetensors' words for dtypes
_INDICES = ("I64", "BOOL")  # of buffers, such as positions and masks; never weights
_INDEX = "model.safetensors.index.json"
_NAMES = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")


@contextlib.contextmanager
def opened(path: FilePath, split_fused: bool) -> Iterator[Source]:
    """Opens a stored model, whose values can be read until the block ends.

    Raises:
        ValueError: there is no such model, or it is in other files than safetensors', or these are damaged.
        OSError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        forms, homes = {}, {}
        for file in _files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ValueError(
                    f"'{file}' must be a safetensors file (got a damaged or another one: {error})"
                ) from None
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                kind = part.get_dtype()
                if kind not in _INDICES:
                    forms[name] = tuple(part.get_shape()), "" if kind in _WEIGHTS else f"quantised ({kind})"
                homes[name] = handle

        def read(name: str) -> Tensor:
            return homes[name].get_tensor(name)

        yield of_tensors(dict(sorted(forms.items(), key=lambda item: _natural(item[0]))), read, split_fused)


_DIGITS = 10  # of a number in a name at most


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns what sorts names with their numbers as numbers: a file has them in the order of the alphabet."""
    return [(int(part), "") if part.isdecimal() and len(part) < _DIGITS else (-1, part) for part in name.split(".")]


def _files(path: FilePath) -> list[Path]:
    """Returns the safetensors files of a model: of a file, a folder, or a name on the Hub."""
    place = Path(path)
    if not os.fspath(path):
        raise ValueError("a stored model must have a path or a name (got '')")
    if place.is_file():
        return [place]
    if not place.is_dir():
        place = _from_hub(path)
    if (place / _INDEX).is_file():
        return _indexed(place / _INDEX)
    named = [place / name for name in _NAMES if (place / name).is_file()]
    found = named[:1] or sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"'{os.fspath(path)}' must hold a model as safetensors files (got {len(found) or 'no'} such files"
            f"{' and no index' if found else ''}); name a file, or save the model again with save_pretrained"
        )
    return found


def _indexed(index: Path) -> list[Path]:
    """Returns the files that an index names."""
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in dict.fromkeys(homes)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{index}' must be an index of safetensors files (got another file: {error!r})") from None


def _from_hub(name: FilePath) -> Path:
    """Returns the folder of a model that the Hub has under a name, with what of it is downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"'{os.fspath(name)}' is no file or folder, and a name on the Hub needs pip install huggingface_hub"
        ) from None
    try:
        folder = snapshot_download(os.fspath(name), allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # as all of the Hub's are
        raise ValueError(
            f"'{os.fspath(name)}' must be a file, a folder or the name of a model on the Hub (got none: "
            f"{str(error).splitlines()[0]})"
        ) from error
    return Path(folder)
