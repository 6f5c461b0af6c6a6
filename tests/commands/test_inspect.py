"""`childtune inspect`: what a child network's file, or a delta, holds."""

import copy
import json

import pytest
import torch
from models import Tiny, child_of
from safetensors.torch import save_file

from childtune_fast import __main__


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, child = Tiny(), child_of(Tiny())
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.classifier.bias.add_(1)
        for name, mask in child.masks().items():
            model.get_parameter(name).add_(mask.float())
    child.save("child.safetensors")
    child.save_delta("delta.safetensors", model, base)
    return child


def test_a_child_network(stored, capsys):
    assert __main__.main("inspect", "child.safetensors") == 0
    output = capsys.readouterr().out
    assert "file              child network\n" in output
    assert f"fingerprint       {stored.fingerprint}\n" in output
    assert output.endswith(f"{stored.summary()}\n")
    assert __main__.main("inspect", "child.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = [{"name": row.name, "kept": row.count, "weights": row.numel} for row in stored.summary().tensors]
    assert sorted(found["tensors"], key=str) == sorted(rows, key=str)


def test_a_delta(stored, capsys):
    assert __main__.main("inspect", "delta.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["in full"]) == ("delta", "classifier.bias")
    assert found["masked tensors"] == len(stored.masks())
    assert found["as in the base"] == 3  # the embedding, the head's weight, a buffer
    assert found["bytes"] > 0
    assert sum(row["kept"] for row in found["tensors"]) == stored.summary().total.count


def test_the_folder_of_a_delta(stored, capsys):
    assert __main__.main("inspect", ".") == 0
    assert "file              delta\n" in capsys.readouterr().out


def test_other_files(stored, tmp_path, capsys):
    save_file({"a": torch.ones(2)}, "other.safetensors")
    (tmp_path / "text").write_text("not a model")
    damaged = bytearray((tmp_path / "child.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    for path, said in (
        ("other.safetensors", "must be a child network, delta or Fisher scores file"),
        ("text", "must be a child network, delta or Fisher scores file"),
        ("damaged", "has been altered or damaged"),
        ("missing", "No such file"),
    ):
        assert __main__.main("inspect", path) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert __main__.main("inspect") == 2
    assert __main__.main("inspect", "--help") == 0
    assert "childtune inspect delta.safetensors --json" in capsys.readouterr().out
