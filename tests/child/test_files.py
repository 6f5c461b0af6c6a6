"""Files of child networks: round trips to the bit; of both kinds: damaged, foreign and unwritable ones."""

import copy
import os
import re

import pytest
import torch
from models import Tiny, child_of
from safetensors.torch import save_file
from torch import nn

from childtune_fast import ChildNetwork


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


# ---- Child networks ------------------------------------------------------------------------------------------------


def test_a_child_network_comes_back(path):
    model = Tiny()
    child = child_of(model)
    child.save(path)
    other = Tiny(seed=3)
    loaded = ChildNetwork.load(path, other)
    assert list(loaded.packed) == list(child.packed)
    assert loaded.fingerprint == child.fingerprint
    assert loaded.mask_of(other.blocks[0].attention.weight) is loaded.packed["blocks.0.attention.weight"]


def test_a_loaded_child_network_does_not_depend_on_its_file(path):
    child = child_of(Tiny())
    child.save(str(path))
    loaded = ChildNetwork.load(str(path), Tiny())
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert loaded.fingerprint == child.fingerprint == ChildNetwork.from_masks(Tiny(), loaded.masks()).fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Tiny(width=8), r"'blocks.0.attention.bias' of shape \(16,\) \(got one of shape \(8,\)\)"),
        (lambda: Tiny(blocks=1), r"'blocks.1.attention.bias' of shape \(16,\) \(got none of that name\)"),
    ],
)
def test_the_child_network_of_another_model_is_refused(path, model, message):
    child_of(Tiny()).save(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}; it is of another model"):
        ChildNetwork.load(path, model())


# ---- Damaged and foreign files -------------------------------------------------------------------------------------


def small_file(path, kind):
    """Writes a file of one masked parameter; returns what reads it."""
    model = nn.Linear(3, 2, bias=False)
    child = ChildNetwork.from_masks(model, {"weight": torch.eye(3)[:2].bool()})
    if kind == "child network":
        child.save(path)
        return lambda: ChildNetwork.load(path, model)
    base = copy.deepcopy(model)
    child.save_delta(path, model, base)
    return lambda: ChildNetwork.apply_delta(path, base)


@pytest.mark.parametrize("kind", ["child network", "delta"])
def test_a_truncated_file_is_refused(path, kind):
    read = small_file(path, kind)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read()
    path.write_bytes(whole)
    read()


@pytest.mark.parametrize("kind", ["child network", "delta"])
def test_a_file_with_any_altered_byte_is_refused(path, kind):
    read = small_file(path, kind)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "truncated, altered or no"),
        (b"PK\3\4" * 100, "truncated, altered or no"),
        (None, "another safetensors file"),
    ],
)
def test_a_foreign_file_is_refused(path, contents, message):
    if contents is None:
        save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(contents)
    for read in (ChildNetwork.load, ChildNetwork.apply_delta):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            read(path, Tiny())


def test_a_file_of_the_other_kind_is_refused(path):
    small_file(path, "delta")
    with pytest.raises(ValueError, match=r"must be a child network file .* \(got delta file\)"):
        ChildNetwork.load(path, Tiny())
    child_of(Tiny()).save(path)
    with pytest.raises(ValueError, match=r"must be a delta file .* \(got child network file\)"):
        ChildNetwork.apply_delta(path, Tiny())


def test_no_file_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ChildNetwork.load(tmp_path / "none", Tiny())
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        ChildNetwork.apply_delta(tmp_path, Tiny())


def test_no_folder_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        child_of(Tiny()).save(tmp_path / "none" / "file")


def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    child_of(Tiny()).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ChildNetwork.random(Tiny(), reserve_p=0.1, seed=0).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
