"""Models in files: folders, files and names on the Hub, and what is said of those that cannot be read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from childtune_fast import spectra


def layers(count=12):
    torch.manual_seed(0)
    return {f"h.{i}.weight": torch.randn(16, 12) for i in range(count)}


def names(path, **options):
    return [row.longname for row in spectra.analyze(path, progress=False, **options)]


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    save_file(layers(), tmp_path / "model.safetensors")
    assert names(tmp_path) == [f"h.{i}" for i in range(12)]


def test_a_model_in_several_files_is_read_by_its_index(tmp_path):
    tensors = layers(4)
    homes = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(homes.values()):
        save_file({name: tensors[name] for name, home in homes.items() if home == file}, tmp_path / file)
    save_file(layers(9), tmp_path / "other.safetensors")  # which the index does not name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    assert names(tmp_path) == [f"h.{i}" for i in range(4)]


def test_the_model_s_file_is_taken_and_not_another_one_beside_it(tmp_path):
    save_file(layers(2), tmp_path / "model.safetensors")
    save_file(layers(9), tmp_path / "child.safetensors")
    assert names(tmp_path) == ["h.0", "h.1"]


def test_a_folder_with_one_file_of_another_name_is_read(tmp_path):
    save_file(layers(2), tmp_path / "consolidated.safetensors")
    assert names(tmp_path) == ["h.0", "h.1"]


def test_adapters_are_read(tmp_path):
    save_file(
        {"base.q.lora_A.weight": torch.randn(8, 32), "base.q.lora_B.weight": torch.zeros(32, 8)},
        tmp_path / "adapter_model.safetensors",
    )
    found = spectra.analyze(tmp_path, progress=False)
    assert [(row.longname, row.status) for row in found] == [
        ("base.q.lora_A", "success"),
        ("base.q.lora_B", "all zero"),
    ]


def test_quantised_and_recurrent_tensors_are_skipped(tmp_path):
    tensors = {
        "q.weight": torch.zeros(32, 32, dtype=torch.int8),
        "g.qweight": torch.zeros(32, 32, dtype=torch.int32),
        "f.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn),
        "r.weight_hh_l0_reverse": torch.randn(32, 32),
        "positions": torch.arange(64).view(8, 8),
        "cls_token": torch.randn(1, 1, 32),
        "norm.weight": torch.ones(32),
        "meta.weight": torch.randn(16, 12),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = spectra.analyze(tmp_path, progress=False)
    assert [row.longname for row in found] == ["meta"]
    assert found.skipped == {
        "cls_token": "of no known kind (cls_token, 3 dimensions)",
        "f": "quantised (F8_E4M3)",
        "g.qweight": "quantised (I32)",
        "q": "quantised (I8)",
        "r.weight_hh_l0_reverse": "recurrent",
    }


def test_a_name_on_the_hub_is_looked_up_in_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    save_file(layers(2), snapshot / "model.safetensors")
    (tmp_path / "models--someone--model/refs").mkdir()
    (tmp_path / "models--someone--model/refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    assert names("someone/model") == ["h.0", "h.1"]
    with pytest.raises(
        ValueError, match=r"^'someone/other' must be a file, a folder or the name of a model on the Hub"
    ):
        names("someone/other")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"must hold a model as safetensors files \(got no such files\)"),
        (["pytorch_model.bin"], r"got no such files\); name a file, or save the model again with save_pretrained"),
        (["a.safetensors", "b.safetensors"], r"got 2 such files and no index\)"),
    ],
)
def test_a_folder_without_a_model_is_refused(files, message, tmp_path):
    for name in files:
        save_file(layers(1), tmp_path / name)
    with pytest.raises(ValueError, match=message):
        names(tmp_path)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    torch.save(nn.Linear(12, 12).state_dict(), tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"model.bin' must be a safetensors file"):
        names(tmp_path / "model.bin")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json' must be an index of safetensors files"):
        names(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(OSError, match=r"gone.safetensors"):
        names(tmp_path)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing/here/at/all' must be a file, a folder or the name of a model"):
        names(tmp_path / "nothing/here/at/all")
