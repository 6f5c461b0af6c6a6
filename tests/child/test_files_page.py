"""docs/files.md: others read our files as it says, and its recipe for merging runs."""

import copy

import numpy as np
import torch
from models import Tiny, child_of
from pages import codes
from safetensors import safe_open

from childtune_fast import ChildNetwork


def test_a_child_network_is_read_with_numpy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = child_of(Tiny())
    child.save("child.safetensors")
    names = {}
    exec(codes("files.md")[0], names)
    expected = child.masks()
    assert names["masks"].keys() == expected.keys()
    for name, mask in names["masks"].items():
        assert np.array_equal(mask, expected[name].numpy())


def test_a_delta_is_read_as_the_page_says(tmp_path):
    base, child = Tiny(), child_of(Tiny())
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, param in model.named_parameters():
            mask = child.masks().get(name)
            param.add_(1 if mask is None else mask.float())
    child.save_delta(tmp_path / "delta.safetensors", model, base)
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert set(file.metadata()) == {"format", "childtune_fast", "description", "sha256"}
    for name, param in model.named_parameters():
        kinds = {key.partition("/")[0] for key in read if key.partition("/")[2] == name}
        if name in child.masks():
            assert kinds == {"bits", "values"}
            assert torch.equal(read[f"values/{name}"], param[child.masks()[name]])
            assert len(read[f"bits/{name}"]) % 128 == 0
        else:
            assert kinds == {"full"}
            assert torch.equal(read[f"full/{name}"], param)


def test_two_deltas_are_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Tiny()
    for seed, path in enumerate(("a.safetensors", "b.safetensors")):
        model, child = copy.deepcopy(base), ChildNetwork.random(base, reserve_p=0.3, seed=seed)
        with torch.no_grad():
            for name, mask in child.masks().items():
                model.get_parameter(name).add_(mask.float())
        child.save_delta(path, model, base)
    names = {"base": base, "copy": copy}
    exec(codes("files.md")[1], names)
    a, b = (ChildNetwork.random(base, reserve_p=0.3, seed=seed).masks() for seed in (0, 1))
    for name, before in base.named_parameters():
        by = (a[name].float() + b[name].float()) / 2 if name in a else torch.zeros_like(before)
        assert torch.allclose(names["merged"].get_parameter(name), before + by, rtol=0, atol=1e-6), name
