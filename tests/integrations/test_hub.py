"""Deltas of transformers' models in folders and on the Hub, which a folder stands in for."""

import json
from pathlib import Path

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
    scores = {"eval_accuracy": 0.75}
    hub.save_pretrained(tmp_path / "delta", model, child, base=base, settings=settings, scores=scores)
    about = json.loads((tmp_path / "delta" / "childtune.json").read_text())
    total = child.summary().total
    assert about["child_network"] == {
        "kept": total.count,
        "maskable": total.numel,
        "reserve_p": round(total.density, 6),
    }
    assert (about["settings"]["fisher_batches"], about["settings"]["maskable"]) == (7, "<lambda>")
    assert about["scores"] == scores
    card = ModelCard.load(tmp_path / "delta" / "README.md")
    assert (card.data.library_name, card.data.tags, card.data.base_model) == ("childtune_fast", ["child-tuning"], None)
    for line in (
        "| fisher_batches | 7 |",
        "| eval_accuracy | 0.75 |",
        f"| kept | {total.count:,} |",
        f"| base | {base} |",
    ):
        assert line in card.text


def test_a_base_on_the_hub_is_named_in_the_card_s_data(tmp_path, base, monkeypatch):
    model, child = tuned(base)
    load_base = hub.load_base
    monkeypatch.setattr(hub, "load_base", lambda config, dtype, name, *rest: load_base(config, dtype, base))
    hub.save_pretrained(tmp_path / "delta", model, child, base="some/bert", revision="v1")
    assert ModelCard.load(tmp_path / "delta" / "README.md").data.base_model == "some/bert"
    assert "| base | some/bert at v1 |" in (tmp_path / "delta" / "README.md").read_text()
    assert_same(hub.from_pretrained(tmp_path / "delta"), model)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return put_in_place(tmp_path / "hub", monkeypatch)


def test_push_and_load_again(tmp_path, base, stand_in):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
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
    assert not list((tmp_path / "again").glob("*"))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("childtune.json", {}, "must name base, revision and dtype"),
        ("childtune.json", {"base": "{base}", "revision": None, "dtype": "float33"}, "name of a dtype of torch"),
        ("childtune.json", {"base": 3, "revision": None, "dtype": "float32"}, "base must be a string"),
        ("config.json", {"model_type": "bert", "architectures": ["Trainer"]}, "must be of a class of transformers"),
        ("config.json", {"model_type": "bert"}, "must be of a class of transformers"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, base, file, values, said):
    model, child = tuned(base)
    hub.save_pretrained(tmp_path / "delta", model, child, base=base)
    Path(tmp_path / "delta" / file).write_text(json.dumps(values).replace("{base}", base))
    with pytest.raises((ValueError, TypeError), match=said):
        hub.from_pretrained(tmp_path / "delta")


def test_wrong_arguments(tmp_path, base):
    model, child = tuned(base)
    for wrong, said in (
        ({"model": torch.nn.Linear(2, 2)}, "model must be a model of transformers"),
        ({"child": None}, "child must be a ChildNetwork"),
        ({"base": model}, "base must be a name on the Hub or a folder"),
    ):
        with pytest.raises(TypeError, match=said):
            hub.save_pretrained(tmp_path / "delta", **{"model": model, "child": child, "base": base, **wrong})
