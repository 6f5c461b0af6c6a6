"""`childtune fisher` and `childtune choose`: the same scores and child network as by hand."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import load, save_base
from transformers import AutoTokenizer, DataCollatorWithPadding

from childtune_fast import ChildNetwork, __main__, estimate_fisher
from childtune_fast.child import files


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    random.seed(0)
    lines = ["sentence1\tsentence2\tlabel\tscore"]
    for index in range(12):
        a, b = (" ".join(f"w{random.randrange(3, 40)}" for _ in range(5)) for _ in range(2))
        lines.append(f"{a}\t{b}\t{('no', 'yes', 'so')[index % 3]}\t{index / 4}")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return "base"


def by_hand(base, order, texts=("sentence1", "sentence2"), seed=0, **options):
    """The scores of batches of four in an order of the examples, with the head that a seed draws."""
    lines = [line.split("\t") for line in Path("train.tsv").read_text().splitlines()]
    columns = {name: [line[i] for line in lines[1:]] for i, name in enumerate(lines[0])}
    tokenizer, collate = AutoTokenizer.from_pretrained(base), None
    collate = DataCollatorWithPadding(tokenizer)
    number = {"no": 0, "so": 1, "yes": 2}
    batches = []
    for start in range(0, len(order), 4):
        chosen = order[start : start + 4]
        encoded = [
            {**tokenizer(*(columns[name][i] for name in texts)), "labels": number[columns["label"][i]]} for i in chosen
        ]
        batches.append(collate(encoded))
    return estimate_fisher(load(base, seed), batches, progress=False, **options)


def order_of(seed=0):
    import datasets

    return datasets.Dataset.from_dict({"i": range(12)}).shuffle(seed=seed)["i"]


@pytest.mark.parametrize("per_example", [False, True])
def test_scores_are_those_of_estimate_fisher(base, per_example, capsys):
    options = ["--text", "sentence1", "sentence2", "--batch-size", "4", "--device", "cpu", "--json"]
    options += ["--per-example"] * per_example
    assert __main__.main("fisher", base, "train.tsv", *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["batches"], told["architecture"], told["num_labels"]) == (3, "BertForSequenceClassification", 3)
    expected = by_hand(base, order_of(), per_example=per_example)
    found, about = files.read_scores("scores.safetensors")
    assert found.keys() == expected.keys() == load_file("scores.safetensors").keys()
    for name, scores in expected.items():
        assert torch.equal(found[name], scores), name
    assert about["per_example"] == per_example


def test_few_batches_and_one_text(base, capsys):
    options = ["--text", "sentence2", "--batch-size", "4", "--batches", "2", "--seed", "5", "--out", "few.safetensors"]
    assert __main__.main("fisher", base, "train.tsv", *options, "--device", "cpu") == 0
    found = load_file("few.safetensors")
    for name, scores in by_hand(base, order_of(5)[:8], texts=("sentence2",), seed=5).items():
        assert torch.equal(found[name], scores), name
    assert "batches           2\n" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "label"), [("regression", "score"), ("causal-lm", None)])
def test_other_tasks(base, tmp_path, task, label, capsys):
    if task == "causal-lm":
        from models import family

        base = "gpt"
        family("GPT-2")[0].save_pretrained(base)
        AutoTokenizer.from_pretrained("base").save_pretrained(base)
    options = ["--task", task, "--text", "sentence1", *(["--label", label] if label else [])]
    assert __main__.main("fisher", base, "train.tsv", *options, "--device", "cpu") == 0
    found, about = files.read_scores("scores.safetensors")
    assert about["architecture"] == ("GPT2LMHeadModel" if task == "causal-lm" else "BertForSequenceClassification")
    assert about["num_labels"] == {"regression": 1, "causal-lm": 2}[task]  # the latter is transformers' own
    assert all(score.isfinite().all() for score in found.values())
    assert sum(score.sum() for score in found.values()) > 0
    capsys.readouterr()
    assert __main__.main("choose", base, "scores.safetensors", "--reserve-p", "0.3") == 0


def test_the_child_network_is_that_of_from_scores(base, capsys):
    main = ["fisher", base, "train.tsv", "--text", "sentence1", "--device", "cpu"]
    assert __main__.main(*main) == 0
    capsys.readouterr()
    scores = load_file("scores.safetensors")
    model = load(base)
    for options, expected in (
        ([], ChildNetwork.from_scores(model, scores, reserve_p=0.2)),
        (["--scope", "tensor"], ChildNetwork.from_scores(model, scores, reserve_p=0.2, scope="tensor")),
        (["--lowest"], ChildNetwork.lowest(model, scores, reserve_p=0.2)),
        (["--maskable", "query"], ChildNetwork.from_scores(model, scores, reserve_p=0.2, maskable="query")),
    ):
        assert __main__.main("choose", base, "scores.safetensors", "--reserve-p", "0.2", *options) == 0
        assert str(expected.summary()) in capsys.readouterr().out
        assert ChildNetwork.load("child.safetensors", model).fingerprint == expected.fingerprint
    save_file(scores, "plain.safetensors")  # whose model is then the one that the configuration names
    load(base).save_pretrained("with-head")
    options = ["--reserve-p", "0.2", "--plot", "density.svg", "--json"]
    assert __main__.main("choose", "with-head", "plain.safetensors", *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fingerprint"] == ChildNetwork.from_scores(model, scores, reserve_p=0.2).fingerprint
    assert Path("density.svg").read_text().count("</svg>") == 1


def test_a_file_of_scores_is_inspected(base, capsys):
    assert __main__.main("fisher", base, "train.tsv", "--text", "sentence1", "--device", "cpu") == 0
    capsys.readouterr()
    assert __main__.main("inspect", "scores.safetensors", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    scores = load_file("scores.safetensors")
    assert told["file"] == "Fisher scores"
    assert told["sums"] == {name: float(score.double().sum()) for name, score in scores.items()}
    assert __main__.main("inspect", "scores.safetensors") == 0
    assert "sum by tensor" in capsys.readouterr().out


def test_scores_of_another_model_are_told(base, capsys):
    from models import family

    family("GPT-2")[0].save_pretrained("gpt")
    assert __main__.main("fisher", base, "train.tsv", "--text", "sentence1", "--device", "cpu") == 0
    assert __main__.main("choose", "gpt", "scores.safetensors", "--reserve-p", "0.3") == 2
    assert (
        "a BertForSequenceClassification must have a configuration of its own (got a GPT2Config)"
        in capsys.readouterr().err
    )


def test_code_beside_a_model_is_not_run(base, capsys):
    Path("custom").mkdir()
    Path("custom/other.py").write_text("open('ran', 'w').close()\nclass Config: pass\n")
    Path("custom/config.json").write_text('{"model_type": "unknown", "auto_map": {"AutoConfig": "other.Config"}}')
    ChildNetwork.random(load(base), reserve_p=0.5, seed=0).save("custom/child.safetensors")
    save_file({"a": torch.ones(2)}, "a.safetensors")
    for words in (
        "fisher custom train.tsv --text sentence1",
        "choose custom a.safetensors --reserve-p 0.3",
        "delta make custom --base base --out x",
    ):
        assert __main__.main(*words.split()) == 2
        found = capsys.readouterr()
        assert "custom code" in found.err
        assert found.out == ""
    assert not Path("ran").exists()


def test_a_package_that_is_missing_is_named(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert __main__.main("fisher", base, "train.tsv", "--text", "sentence1") == 2
    assert capsys.readouterr().err == "fisher: needs the package datasets; pip install datasets\n"


def test_an_interrupt_ends_in_a_line(base, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("childtune_fast.commands.fisher.estimate_fisher", interrupted)
    assert __main__.main("fisher", base, "train.tsv", "--text", "sentence1", "--device", "cpu") == 130
    assert capsys.readouterr().err.endswith("fisher: interrupted\n")
    assert not Path("scores.safetensors").exists()


def test_a_padding_token_that_only_the_tokenizer_knows(base):
    from models import family

    family("GPT-2", head="SequenceClassification")[0].save_pretrained("gpt")
    AutoTokenizer.from_pretrained("base").save_pretrained("gpt")
    assert __main__.main("fisher", "gpt", "train.tsv", "--text", "sentence1", "--device", "cpu") == 0


def test_half_precision_is_scored_in_float32(base):
    load(base).half().save_pretrained("half")
    assert __main__.main("fisher", "half", "train.tsv", "--text", "sentence1", "--device", "cpu") == 0
    scores, _ = files.read_scores("scores.safetensors")
    load("half").float().save_pretrained("float")
    assert __main__.main("fisher", "float", "train.tsv", "--text", "sentence1", "--device", "cpu") == 0
    for name, expected in files.read_scores("scores.safetensors")[0].items():
        assert torch.equal(scores[name], expected), name


WRONG = (
    ("fisher base train.tsv --text sentence", "fisher: 'train.tsv' must have the columns asked for"),
    ("fisher base train.tsv --text sentence1 --label x", "no 'x' in"),
    ("fisher base none.tsv --text sentence1", "none.tsv"),
    ("fisher base none/data --text sentence1", "none/data"),
    ("fisher no-model train.tsv --text sentence1", "'no-model' cannot be loaded"),
    ("fisher base train.tsv --text sentence1 --out no/s", "a file to write must be in a folder"),
    ("fisher base train.tsv --text a b c", "--text takes one column, or two"),
    ("fisher base train.tsv --text sentence1 --device abacus", "abacus"),
    ("fisher base train.tsv --text sentence1 --label sentence1", "each column can be asked for once"),
    ("fisher base train.tsv --text sentence1 --split dev", "--config and --split are of data on the Hub"),
    ("fisher base train.tsv --text sentence1 --max-length 17", "--max-length must be 16 at most"),
    ("fisher base train.tsv --text sentence1 --batches 0", "must be a whole number above 0"),
    (
        "fisher base train.tsv --text sentence1 --task regression",
        "must have a number in every row (got 'no' in row 1)",
    ),
    ("fisher base base/config.json --text sentence1", "'base/config.json'"),
    ("fisher base train.tsv", "the following arguments are required: --text"),
    ("choose base train.tsv --reserve-p 0.3", "must hold scores by name in a safetensors file"),
    ("choose base base/model.safetensors --reserve-p 0.3 --plot x.txt", "a picture's name"),
    ("choose base base/model.safetensors --reserve-p 1.3", "must lie in (0, 1]"),
    ("choose base child.safetensors --reserve-p 0.3", "must be a Fisher scores file"),
)


def test_what_is_wrong_is_told_in_a_line(base, capsys):
    ChildNetwork.random(load(base), reserve_p=0.5, seed=0).save("child.safetensors")
    for arguments, said in WRONG:
        assert __main__.main(*arguments.split()) == 2, arguments
        told = capsys.readouterr().err.splitlines()
        assert said in told[-1]
        assert "Traceback" not in "".join(told)
