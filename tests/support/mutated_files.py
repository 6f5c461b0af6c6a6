"""Random mutations of delta and child files, and what must come of each: the right model, or an error and none.

Whatever is random is a choice of one of `n` things, by a function `pick(n)` that returns an integer from 0 to n - 1. So
hypothesis, a seeded generator and a coverage-guided fuzzer can all drive it.
"""

import json

import numpy as np
import torch
from forged_files import KINDS, Model, contents_of, same_state, state_of, use, write
from helpers import raw
from safetensors import SafetensorError

from childtune_fast.ops.tensor_parts import parts, same_bits

DTYPES = [torch.uint8, torch.int8, torch.bool, torch.int16, torch.bfloat16, torch.float16, torch.int32, torch.float32]
DTYPES += [torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.uint64]
VALUES = [
    None,
    True,
    0,
    -1,
    1 << 63,
    10**400,
    2.0,
    1e999,
    "",
    "0" * 64,
    "sparse_coo",
    "meta",
    "mkldnn",
    "\ud800",
    [],
    {},
]
VALUES += [[0], [-1], [2, 3], [1 << 62, 1 << 62], [[2], 3], ["2", 3], {"a": [2, 3]}, {"a": "meta"}, {"": []}]
WORDS = ["", "a", "bits", "values", "full", "full.", "full.values", "full.indices", "full.scale", "full.axis", "other"]
SHAPES = [(), (0,), (1,), (2,), (3,), (2, 3), (3, 2), (6,), (128,), (256,), (4,), (0, 1 << 40), (1, 1, 1)]


class Files:
    """The whole files of both kinds in a folder, and what they hold."""

    def __init__(self, folder):
        self.path = folder / "file.safetensors"
        self.contents = {kind: contents_of(self.path, kind) for kind in KINDS}
        self.bytes = {}
        for kind in KINDS:
            write(self.path, kind, *self.contents[kind])
            self.bytes[kind] = self.path.read_bytes()
        self.base, self.tuned = state_of(Model()), state_of(Model(tuned=True))


def copied(description):
    return json.loads(json.dumps(description))


def one_of(pick, things):
    return things[pick(len(things))]


# ---- Mutations -----------------------------------------------------------------------------------------------------


def mutate_tensor(pick, tensor):
    """Returns another tensor, most often of the same memory or of a part of it."""
    data = raw(tensor)
    for _ in range(pick(2)):  # each flips a bit
        if len(data):
            data[pick(len(data))] ^= 1 << pick(8)
    how, shape, dtype = pick(7), one_of(pick, SHAPES), one_of(pick, DTYPES)
    if how == 0:
        return torch.zeros(shape, dtype=dtype)
    if how == 1:
        return (tensor.real if tensor.is_complex() else tensor).to(dtype).contiguous()
    if how == 2:
        return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    elements = data.view(-1, tensor.element_size())
    if how == 3:
        elements = elements[: max(len(elements) - 1 - pick(3), 0)]
    elif how == 4:
        elements = torch.cat([elements, elements[: 1 + pick(3)]])
    elif how == 5:
        elements = elements.flip(0)
    else:
        return data.view(tensor.dtype).view(tensor.shape)
    return elements.reshape(-1).clone().view(tensor.dtype)


def mutate_tensors(pick, tensors):
    names = sorted(tensors)
    name, other = one_of(pick, names), one_of(pick, names)
    new = (
        other if pick(2) else f"{one_of(pick, WORDS)}{one_of(pick, ['/', '', '//'])}{one_of(pick, [*Model.NAMES, ''])}"
    )
    how = pick(10)  # most often, one tensor becomes another under its name
    if how == 0:
        del tensors[name]
    elif how == 1 and new != "__metadata__":
        tensors[new] = tensors.pop(name)
    elif how == 2:
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif how == 3:
        tensors[new] = mutate_tensor(pick, tensors[name])
    else:
        tensors[name] = mutate_tensor(pick, tensors[name])


def mutate_json(pick, value):
    """Changes one place in what JSON can hold."""
    while True:
        keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        key = one_of(pick, keys) if keys else ""
        inner = value[key] if keys else None
        if not (isinstance(inner, (dict, list)) and inner and pick(4)):
            break
        value = inner
    how = pick(4)
    if how == 0 and keys:
        del value[key]
    elif how == 1 and keys:
        value[key] = value[one_of(pick, keys)]
    elif how == 2 and isinstance(value, dict):
        value[one_of(pick, [*WORDS, *Model.NAMES])] = copied(one_of(pick, VALUES))
    elif keys:
        value[key] = copied(one_of(pick, VALUES))


def mutate_bytes(pick, data):
    data = bytearray(data)
    for _ in range(1 + pick(3)):
        place, how = pick(len(data) + 1), pick(5)
        if how == 0:
            del data[place:]
        elif how == 1:
            data[place:place] = bytes([pick(256)]) * (1 + pick(9))
        elif how == 2:
            del data[place : place + 1 + pick(9)]
        else:
            data[place : place + 1] = bytes([pick(256)])
    return bytes(data)


def with_header(data, change):
    """Returns a file's bytes with another header, whose length is right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


# ---- What must come of them ----------------------------------------------------------------------------------------


def check_contents(files, pick):
    """Changes what a file holds, with the right digest; returns whether the file was refused."""
    kind = one_of(pick, KINDS)
    tensors, description = {k: t.clone() for k, t in files.contents[kind][0].items()}, copied(files.contents[kind][1])
    for _ in range(1 + pick(2)):
        if tensors and pick(3):
            mutate_tensors(pick, tensors)
        else:
            mutate_json(pick, description)
    if not pick(20):
        description = mutate_bytes(pick, json.dumps(description).encode()).decode(errors="replace")
    try:
        write(files.path, kind, tensors, description)
    except (SafetensorError, RuntimeError):  # tensors that share memory
        return True
    return _refused(files, kind, lambda child, model: assert_as_stored(files, kind, tensors, child, model))


def check_bytes(files, pick):
    """Changes a file's bytes, or its header as a whole; returns whether the file was refused."""
    kind = one_of(pick, KINDS)
    data = files.bytes[kind]
    data = with_header(data, lambda header: mutate_json(pick, header)) if pick(2) else mutate_bytes(pick, data)
    files.path.write_bytes(data)
    wanted = files.tuned if kind == "delta" else files.base
    return _refused(files, kind, lambda _, model: same_state(model, wanted))


def _refused(files, kind, check):
    model = Model()
    try:
        child = use(files.path, kind, model)
    except (ValueError, OSError) as error:
        text = str(error)
    else:
        assert check(child, model)
        return False
    assert str(files.path) in text
    assert same_state(model, files.base)
    return True


def assert_as_stored(files, kind, tensors, child, model):
    """Asserts that masks are those in a file, and the model what its tensors make of the base; returns True."""
    prefix = "bits/" if kind == "delta" else ""
    assert {name: mask.bits.tolist() for name, mask in child.packed.items()} == {
        name.removeprefix(prefix): bits.tolist() for name, bits in tensors.items() if name.startswith(prefix)
    }
    if kind != "delta":
        return same_state(model, files.base)
    for name, now in state_of(model).items():
        stored = {key.partition("/")[0]: tensor for key, tensor in tensors.items() if key.partition("/")[2] == name}
        if "bits" in stored:
            mask = np.unpackbits(stored["bits"].numpy(), bitorder="little")[: now.numel()].astype(bool)
            wanted = raw(files.base[name]).view(-1, now.element_size())
            wanted[torch.from_numpy(mask)] = raw(stored["values"]).view(-1, now.element_size())
            assert torch.equal(raw(now), wanted.view(-1))
        elif stored:
            found = {f"full.{part}" if part else "full": tensor for part, tensor in parts(now).items()}
            assert found.keys() == stored.keys()
            assert all(same_bits(found[what], stored[what]) for what in found)
        else:
            assert same_bits(now, files.base[name])
    return True
