"""`childtune delta`: models in folders become small ones, come back, and are merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_models import assert_same, load, save_base, tuned
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from childtune_fast import ChildNetwork, __main__
from childtune_fast.child import TaskVector
from childtune_fast.integrations import hub


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The models of two tasks, in folders `one` and `two` with their child networks, as the trainer saves them."""
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base")
    models = {}
    for seed, name in ((1, "one"), (2, "two")):
        models[name], child = tuned(base, seed)
        models[name].save_pretrained(name)
        AutoTokenizer.from_pretrained(base).save_pretrained(name)
        child.save(f"{name}/child.safetensors")
    return models


def test_a_model_becomes_a_delta_and_comes_back(stored, capsys):
    assert __main__.main("delta", "make", "one", "--base", "base", "--out", "small", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["delta.safetensors"] > told["child.safetensors"] > 0
    assert __main__.main("delta", "apply", "small", "--out", "again") == 0
    found = AutoModelForSequenceClassification.from_pretrained("again")
    assert_same(found, stored["one"])
    child = ChildNetwork.load("one/child.safetensors", found)
    assert ChildNetwork.load("again/child.safetensors", found).fingerprint == child.fingerprint
    for folder in ("small", "again"):
        assert AutoTokenizer.from_pretrained(folder)("w3 w5")["input_ids"] == [3, 5]


def test_two_deltas_are_merged_onto_their_base(stored, capsys):
    for name in stored:
        assert __main__.main("delta", "make", name, "--base", "base", "--out", f"{name}-delta") == 0
    capsys.readouterr()
    both = ["one-delta", "two-delta"]
    assert __main__.main("delta", "merge", *both, "--weights", "0.5", "0.25", "--out", "merged", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    base = load("base")
    one, two = (TaskVector.between(stored[name], base, without="classifier") for name in stored)
    assert told["cosine 1, 2"] == round(one.cosine(two), 4)
    assert told["left out"] == "classifier.bias, classifier.weight"
    (0.5 * one + 0.25 * two).apply(base)
    assert_same(AutoModel.from_pretrained("merged"), base.bert)
    assert AutoTokenizer.from_pretrained("merged")("w3")["input_ids"] == [3]
    options = ["--without", "attention", "--out", "halves"]
    assert __main__.main("delta", "merge", *both, *options) == 0
    base = load("base")
    one, two = (TaskVector.between(stored[name], base, without="classifier|attention") for name in stored)
    (0.5 * one + 0.5 * two).apply(base)
    assert_same(AutoModel.from_pretrained("halves"), base.bert)


def test_a_head_that_the_base_has_is_merged(stored, capsys):
    load("base", seed=5).save_pretrained("headed")
    for seed, name in ((3, "three"), (4, "four")):
        model, child = tuned("headed", seed)
        model.save_pretrained(name)
        child.save(f"{name}/child.safetensors")
        assert __main__.main("delta", "make", name, "--base", "headed", "--out", f"{name}-delta") == 0
    assert __main__.main("delta", "merge", "three-delta", "four-delta", "--out", "merged") == 0
    found = AutoModelForSequenceClassification.from_pretrained("merged")
    models = [AutoModelForSequenceClassification.from_pretrained(name) for name in ("three", "four")]
    mean = (models[0].classifier.weight + models[1].classifier.weight) / 2
    assert torch.allclose(found.classifier.weight, mean, atol=1e-6)
    assert not torch.equal(found.classifier.weight, models[0].classifier.weight)


def test_heads_that_differ_are_left_out_in_any_order(stored, capsys):
    load("base", seed=5, num_labels=2).save_pretrained("headed")
    for name, options in (("two", {"num_labels": 2}), ("three", {"ignore_mismatched_sizes": True})):
        model, child = tuned("headed", seed=len(name), **options)
        model.save_pretrained(name)
        child.save(f"{name}/child.safetensors")
        assert __main__.main("delta", "make", name, "--base", "headed", "--out", f"{name}-delta") == 0
    merged = []
    for first, second in (("two", "three"), ("three", "two")):
        capsys.readouterr()
        folders = [f"{first}-delta", f"{second}-delta"]
        assert __main__.main("delta", "merge", *folders, "--out", f"{first}-first", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["class"], told["left out"]) == ("BertModel", "classifier.bias, classifier.weight")
        merged.append(AutoModel.from_pretrained(f"{first}-first"))
    assert_same(*merged)


def test_an_embedding_that_the_base_lacks_is_refused(stored, capsys):
    model = load("base")
    model.resize_token_embeddings(50)
    child = ChildNetwork.random(model, reserve_p=0.3, seed=0)
    model.save_pretrained("larger")
    child.save("larger/child.safetensors")
    assert __main__.main("delta", "make", "larger", "--base", "base", "--out", "larger-delta") == 0
    assert_same(hub.from_pretrained("larger-delta"), model)
    assert __main__.main("delta", "make", "one", "--base", "base", "--out", "one-delta") == 0
    embedding = "'bert.embeddings.word_embeddings.weight'"
    for words, said in (
        ("larger-delta one-delta", f"the base must have {embedding}, of the shape that it has in 'larger-delta'"),
        ("larger-delta one-delta --without embeddings", f"the base must have {embedding}"),
        ("one-delta larger-delta", f"every model must have {embedding}, of the base's shape"),
    ):
        assert __main__.main("delta", "merge", *words.split(), "--out", "merged") == 2
        assert said in capsys.readouterr().err
    assert not Path("merged").exists()
    words = "one-delta larger-delta --without embeddings --out merged"
    assert __main__.main("delta", "merge", *words.split()) == 0, capsys.readouterr().err
    kept = AutoModel.from_pretrained("merged").embeddings.word_embeddings.weight
    assert torch.equal(kept, AutoModel.from_pretrained("base").embeddings.word_embeddings.weight)


WRONG = (
    ("make nothing --base base --out x", "'nothing' cannot be loaded"),
    ("make base --base base --out x", "child.safetensors"),
    ("make one --base nothing --out x", "nothing"),
    ("make one --base two --out x", "weights outside the child network must be the base's"),
    ("make one --out x", "the following arguments are required: --base"),
    ("apply one --out x", "must hold what save_pretrained of childtune_fast wrote"),
    ("merge one-delta one-delta --weights 1 --out x", "--weights must be as many as deltas"),
    ("merge one-delta other-delta --out x", "deltas to merge must be of one base"),
    ("merge one-delta --without ( --out x", "--without"),
    ("merge one-delta --weights nan --out x", "must be a finite number (got nan)"),
    ("", "the following arguments are required: ACTION"),
)


def test_what_is_wrong_is_told_in_a_line(stored, tmp_path, capsys):
    assert __main__.main("delta", "make", "one", "--base", "base", "--out", "one-delta") == 0
    shutil.copytree("base", "moved")
    assert __main__.main("delta", "make", "one", "--base", "moved", "--out", "other-delta") == 0
    capsys.readouterr()
    for arguments, said in WRONG:
        assert __main__.main("delta", *arguments.split()) == 2
        told = capsys.readouterr().err.splitlines()
        assert said in told[-1]
        assert "Traceback" not in "".join(told)
