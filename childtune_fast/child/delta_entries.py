"""What a delta file holds of each tensor of a model, checked: names, shapes, dtypes, counts, and that parts fit."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..arguments import FilePath
from ..ops.packed_mask import PackedMask
from ..ops.tensor_parts import kind_of, parts, rebuilt, same_bits
from . import files


class Entry(NamedTuple):
    """What a delta holds of one tensor: mask and values, or the tensor in full, or only the digest of the base's.

    Attributes:
        kind: what the tensor is, unless it is dense; see `kind_of`.
        digest: the digest of the base's values that were left out.
        mask: the mask of a masked parameter.
        values: the child network's values in it.
        full: the whole tensor, if it is not masked and not the base's.
    """

    kind: str
    digest: str | None
    mask: PackedMask | None = None
    values: Tensor | None = None
    full: Tensor | None = None


def entries(
    path: FilePath,
    shapes: Mapping[str, tuple[int, ...]],
    contents: Mapping[str, Tensor],
    description: Mapping[str, Any],
) -> dict[str, Entry]:
    """Returns {name: what the file holds of that tensor}, for every tensor of the model that the file was made for.

    Raises:
        ValueError: that is not the mask and the values that it selects, one whole tensor, or the digest of the base's.
    """
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for key, tensor in contents.items():
        what, _, name = key.partition("/")
        if name not in stored:
            files.refuse(path, "tensors of the model only", f"{key!r}")
        stored[name][what] = tensor
    digests, kinds = (_texts(path, description, key) for key in ("base", "kinds"))
    return {
        name: _entry(path, name, shape, stored[name], kinds.get(name, ""), digests.get(name))
        for name, shape in shapes.items()
    }


def _texts(path: FilePath, description: Mapping[str, Any], key: str) -> dict[str, str]:
    found = description.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        files.refuse(path, f"texts by name under '{key}'", f"{found!r:.80}")
    return found


def _entry(
    path: FilePath, name: str, shape: tuple[int, ...], stored: Mapping[str, Tensor], kind: str, digest: str | None
) -> Entry:
    if (digest is None) != any(what.startswith("full") for what in stored):
        files.refuse(path, "a digest of the base's values or all of the tensor's", f"both or neither for {name!r}")
    if not stored:
        return Entry(kind, digest)
    if digest is None:
        return Entry(kind, None, full=_whole(path, name, shape, stored, kind))
    if stored.keys() != {"bits", "values"} or kind:
        files.refuse(path, "bits and values of a dense tensor", f"{sorted(stored)} for {name!r}, {kind or 'dense'}")
    mask = files.mask_in(path, name, shape, stored["bits"])
    if stored["values"].shape != (mask.count,):
        got = f"the shape {tuple(stored['values'].shape)}"
        files.refuse(path, f"the {mask.count} values of {name!r} that its mask selects", got)
    return Entry(kind, digest, mask=mask, values=stored["values"])


def _whole(path: FilePath, name: str, shape: tuple[int, ...], stored: Mapping[str, Tensor], kind: str) -> Tensor:
    """Returns a tensor that is stored in full; raises ValueError unless what the file has are just its parts."""
    given = {what.removeprefix("full").removeprefix("."): tensor for what, tensor in stored.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of young layouts, and of indices that it casts
            full = rebuilt(kind, shape, given)
        found = {f"full.{part}" if part else "full": tensor for part, tensor in parts(full).items()}
        fits = (kind_of(full), tuple(full.shape), found.keys()) == (kind, shape, stored.keys())
        got = "" if fits and all(same_bits(tensor, stored[what]) for what, tensor in found.items()) else "others"
    except MemoryError:
        raise
    except KeyError:  # a part is missing
        got = "others"
    except Exception as error:  # whatever torch says of parts that do not fit each other
        got = str(error).partition("\n")[0]
    if got:
        files.refuse(path, f"the parts of a {kind or 'dense'} tensor of shape {shape} for {name!r}", got)
    return full
