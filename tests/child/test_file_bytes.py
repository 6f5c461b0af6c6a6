"""What bytes a file has: the same ones for equal contents, and a header as safetensors makes it."""

import json

import pytest
import torch
from models import Tiny, child_of
from safetensors.torch import save_file
from torch import nn

from childtune_fast import ChildNetwork
from childtune_fast.child import files

# All that safetensors knows but for four bits.
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
DTYPES += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_equal_contents_are_equal_bytes(path):
    child = child_of(Tiny())
    backwards = ChildNetwork.from_masks(Tiny(), dict(reversed(child.masks().items())))
    found = set()
    for each in [child, backwards] * 10:
        each.save(path)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_the_header_is_safetensors_own(tmp_path, path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype} {shape}": torch.randint(2, (*shape, 8), dtype=torch.uint8, generator=generator)
        .repeat_interleave(dtype.itemsize, dim=-1)
        .view(dtype)
        for dtype in DTYPES
        for shape in ((3,), (), (0, 255))
    }
    tensors["strided"] = torch.arange(12.0).view(3, 4).t()
    tensors["scalar"] = torch.tensor(1.0)
    files.write(path, "test", tensors, {"text": "ü", "shapes": {}})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "other")
    ours, theirs = header_of(path), header_of(tmp_path / "other")
    assert list(ours.pop("__metadata__")) == ["format", "childtune_fast", "description", "sha256"]
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        begin, end = ours[name].pop("data_offsets")
        assert begin % tensor.element_size() == 0
        assert end - begin == tensor.nbytes
        del theirs[name]["data_offsets"]
        assert ours[name] == theirs[name]
    contents, description = files.read(path, "test")
    assert description == {"text": "ü", "shapes": {}}
    assert all(files.digest(contents[name]) == files.digest(tensors[name]) for name in tensors)


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    return json.loads(data[8 : 8 + size])


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_a_file_cannot_hold_is_refused(path, name):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(2, 3)))
    child = ChildNetwork.from_masks(model, {name: torch.eye(3)[:2].bool()})
    with pytest.raises(ValueError, match=r"names of parameters must be texts .*; rename the parameter"):
        child.save(path)
    assert not path.exists()
