"""Deltas of transformers' models in folders and on the Hub, which a folder stands in for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import put_in_place
from huggingface_hub import ModelCard
from saved_models import assert_same, load, save_base, tuned

from childtune_fast.integrations import hub
from childtune_fast.integrations.config import ChildTuningConfig


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_to_the_bit(tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype)
    model, child = tuned(base, dtype=dtype)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    found = hub.from_pretrained(tmp_path / "delta")
    assert type(found) is type(model)
    assert not found.training
    assert_same(found, model)
    again = hub.child_from_pretrained(tmp_path / "delta", load(base, dtype=dtype))
    assert again.fingerprint == child.fingerprint


def test_a_base_in_another_dtype_than_the_model(tmp_path):
    base = save_base(tmp_path / "base", torch.bfloat16)
    model, child = tuned(base, dtype=torch.float32)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    assert_same(hub.from_pretrained(tmp_path / "delta"), model)


def test_a_base_with_a_head_of_another_size(tmp_path, base):
    load(base, num_labels=5).save_pretrained(tmp_path / "with-head")
    model, child = tuned(str(tmp_path / "with-head"), ignore_mismatched_sizes=True)
    hub.save_pretrained(tmp_path / "delta", model, child, base=str(tmp_path / "with-head"))
    assert_same(hub.from_pretrained(tmp_path / "delta"), model)


def test_the_card_and_what_a_program_reads(tmp_path, base):
    model, child = tuned(base)
    settings = ChildTuningConfig(mode="D", fisher_batches=7, maskable=lambda name: "query" in name)
    scores = {"eval_accuracy": np.float32(0.75), "a|b\nc": torch.tensor(0.5), "loss": float("nan")}
    hub.save_pretrained(tmp_path / "delta", model, child, base=base, settings=settings, scores=scores)
    about = json.loads((tmp_path / "delta" / "childtune.json").read_text())
    total = child.summary().total
    assert about["child_network"] == {
        "kept": total.count,
        "maskable": total.numel,
        "reserve_p": total.density,
        "fingerprint": child.fingerprint,
    }
    assert (about["settings"]["fisher_batches"], about["settings"]["maskable"]) == (7, "<lambda>")
    assert about["scores"] == {"eval_accuracy": 0.75, "a|b\nc": 0.5, "loss": "nan"}
    card = ModelCard.load(tmp_path / "delta" / "README.md")
    assert (card.data.library_name, card.data.tags, card.data.base_model) == ("childtune_fast", ["child-tuning"], None)
    kept = f"| weights | {total.count:,} of {total.numel:,} maskable ones |"
    for line in (
        "| base | base |",
        kept,
        f"| share | {total.density:.4g} |",
        "| fisher_batches | 7 |",
        "| maskable | &lt;lambda&gt; |",
    ):
        assert line in card.text
    for line in ("| eval_accuracy | 0.75 |", "| a\\|b c | 0.5 |", "| loss | nan |"):
        assert line in card.text


def test_a_base_on_the_hub_is_named_in_the_card_s_data(tmp_path, base, monkeypatch):
    model, child = tuned(base)
    put_in_place(tmp_path / "hub", monkeypatch, base)
    hub.save_pretrained(tmp_path / "delta", model, child, base="some/bert", revision="v1")
    assert ModelCard.load(tmp_path / "delta" / "README.md").data.base_model == "some/bert"
    assert "| base | some/bert at v1 |" in (tmp_path / "delta" / "README.md").read_text()
    assert_same(hub.from_pretrained(tmp_path / "delta"), model)


@pytest.fixture
def stand_in(tmp_path, monkeypatch, base):
    return put_in_place(tmp_path / "hub", monkeypatch, base)


def test_push_and_load_again(tmp_path, base, stand_in):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base="some/bert")
    assert hub.push_to_hub("me/delta", tmp_path / "delta") == "https://huggingface.co/me/delta/commit/1"
    assert (stand_in / "me/delta/README.md").is_file()
    assert_same(hub.from_pretrained("me/delta"), model)


def test_what_is_no_delta_is_told(tmp_path, base, stand_in):
    with pytest.raises(ValueError, match=r"'me/none' must be a folder or a name on the Hub \(got neither: nothing"):
        hub.from_pretrained("me/none")
    with pytest.raises(ValueError, match=r"must hold what save_pretrained .* \(got no child.safetensors\)"):
        hub.from_pretrained(base)
    with pytest.raises(ValueError, match=r"got no delta.safetensors in"):
        hub.push_to_hub("me/delta", base)
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    with pytest.raises(ValueError, match=r"must be of a base on the Hub \(got '/"):
        hub.push_to_hub("me/delta", tmp_path / "delta")


def test_another_base_is_refused(tmp_path, base):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    other = load(base, num_labels=3)
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.bias.add_(1)
        other.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    other.bert.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is for another base"):
        hub.from_pretrained(tmp_path / "delta", base=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="weights outside the child network must be the base's"):
        hub.save_pretrained(tmp_path / "again", model, child, base=str(tmp_path / "other"))
    assert not (tmp_path / "again").exists()


def test_a_base_that_has_gone_is_named(tmp_path, base, monkeypatch):
    model, child = tuned(base)
    monkeypatch.chdir(tmp_path)
    hub.save_pretrained("delta", model, child, base=Path("base"))
    monkeypatch.chdir("/")
    assert_same(hub.from_pretrained(tmp_path / "delta"), model)
    Path(base).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"base', the base of '.*delta', cannot be loaded; say where it is by base="):
        hub.from_pretrained(tmp_path / "delta")
    assert_same(hub.from_pretrained(tmp_path / "delta", base=str(tmp_path / "moved")), model)


def test_code_beside_a_model_is_not_run(tmp_path, base):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    ran = tmp_path / "ran"
    (tmp_path / "delta" / "other.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    told = {"model_type": "unknown", "architectures": ["BertModel"], "auto_map": {"AutoConfig": "other.Config"}}
    (tmp_path / "delta" / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="custom code"):
        hub.from_pretrained(tmp_path / "delta")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("childtune.json", {}, "must name base, revision, dtype and child network"),
        ("childtune.json", {"base": "{base}", "dtype": "float33"}, "name of a dtype of torch"),
        ("childtune.json", {"base": 3}, "base must be a string"),
        ("childtune.json", {"base": "{base}", "child_network": {"fingerprint": "1"}}, "must hold files of one save"),
        ("config.json", {"model_type": "gpt2", "architectures": ["BertModel"]}, "must have a configuration of its own"),
        ("config.json", {"model_type": "bert", "architectures": ["Trainer"]}, "must be of a class of transformers"),
        ("config.json", {"model_type": "bert"}, "must be of a class of transformers"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, base, file, values, said):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    path = tmp_path / "delta" / file
    if values and file == "childtune.json":
        values = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(values).replace("{base}", base))
    with pytest.raises((ValueError, TypeError), match=said):
        hub.from_pretrained(tmp_path / "delta")


def test_wrong_arguments(tmp_path, base):
    model, child = tuned(base)
    for wrong, said in (
        ({"model": torch.nn.Linear(2, 2)}, "model must be a model of transformers"),
        ({"child": None}, "child must be a ChildNetwork"),
        ({"base": model}, "base must be a name on the Hub or a folder"),
        ({"tokenizer": "bert"}, "tokenizer must be a tokenizer or None"),
        ({"settings": ["a"]}, "settings must be a ChildTuningConfig, a mapping or None"),
        ({"scores": [1]}, "scores must be a mapping"),
        ({"scores": {"a": "high"}}, "scores must be numbers"),
    ):
        with pytest.raises(TypeError, match=said):
            hub.save_pretrained(tmp_path / "delta", **{"model": model, "child": child, "base": base, **wrong})
    assert not (tmp_path / "delta").exists()
