"""README.md: every block of Python runs, in its order, on a small model, and the verdict is that of the runs."""

import copy
import functools
import re
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from scipy.stats import t

from benchmarks.finetune import compare, runs

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(compare.__file__).parents[1] / "results"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PAGE = " ".join(TEXT.split())
VERDICT, _, REST = PAGE.partition("**Whom it is for**")


@functools.cache
def reported(folder):
    """Returns {task: {method: its records}} of a folder of results."""
    return compare.by_task(runs.read_all(RESULTS / folder / "runs"), "report")


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the blocks use and do not make: a transformer, the same twice as it was before training, and batches."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=2, **sizes))
    ids = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
    dataloader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}] * 3
    base = copy.deepcopy(model)
    return {"model": model, "base": base, "base_model": copy.deepcopy(base), "dataloader": dataloader, "torch": torch}


def test_every_block_of_python_runs(names):
    """Between those that make an optimizer and those that ask what it did, a few steps are taken."""
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        if "opt = " in block:
            train(names)
    trained, after_delta = names["model"].state_dict(), names["base_model"].state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in names["base"].state_dict().items())
    assert all(torch.equal(value, trained[name]) for name, value in after_delta.items())
    assert sum(row.moved for row in names["after"]) > 0


def train(names):
    """Takes a step on each batch from the pretrained weights, as the README's reader would."""
    names["model"].load_state_dict(names["base"].state_dict())
    for batch in names["dataloader"]:
        names["model"](**batch).loss.backward()
        names["opt"].step()
        names["opt"].zero_grad()


def test_the_verdict_is_what_the_runs_say():
    """Differences to AdamW, as the reports have them: runs that are added must be told."""
    tasks = {"finetune": {"glue/stsb": "STS-B", "glue/mrpc": "MRPC", "docstrings": "docstrings"}}
    tasks["finetune-300"] = {"glue/stsb": "with 300 examples"}
    for folder, names in tasks.items():
        found = reported(folder)
        for task, name in names.items():
            for method in ("f", "d"):
                paired = compare.difference_to(found[task]["vanilla"], found[task][method])
                assert f"{name} {paired}" in VERDICT
    stsb = reported("finetune")["glue/stsb"]
    assert f"LoRA gains as much as D on STS-B, {compare.difference_to(stsb['vanilla'], stsb['lora'])}," in PAGE
    scores = {method: {run["seed"]: runs.score(run) for run in stsb[method]} for method in ("vanilla", "f", "d")}
    assert all(len(of_seed) == 20 for of_seed in scores.values())
    losses, gains = (
        sum(sign * (score - scores["vanilla"][seed]) > 0 for seed, score in scores[method].items())
        for method, sign in (("f", -1), ("d", 1))
    )
    half = compare.difference_to(stsb["vanilla"], stsb["vanilla-sqrtp"])
    seeds = {run["seed"] for run in stsb["vanilla-sqrtp"]}
    same = compare.difference_to(stsb["vanilla"], [run for run in stsb["f"] if run["seed"] in seeds])
    assert f"has {half} there in five seeds, and F {same} in the same" in PAGE
    assert f"**F** loses on STS-B, in {losses} of twenty seeds" in PAGE
    assert f"**D** helps on STS-B, better in {gains} of twenty seeds" in PAGE


def test_what_it_says_of_mrpc_is_what_the_runs_say():
    mrpc = reported("finetune")["glue/mrpc"]
    assert all(len(mrpc[method]) == 20 for method in ("vanilla", "f", "d", "lora"))
    d = compare.difference_to(mrpc["vanilla"], mrpc["d"])
    assert "is perhaps half a point worse on MRPC" in PAGE
    assert f"{d.mean:.1f}" == "-0.5"
    score_of = {run["seed"]: runs.score(run) for run in mrpc["vanilla"]}
    worse = sum(runs.score(run) < score_of[run["seed"]] for run in mrpc["d"])
    assert f"worse on MRPC, worse in {worse} of twenty," in PAGE
    assert f"loses on MRPC, {compare.difference_to(mrpc['vanilla'], mrpc['lora'])}." in PAGE
    bad = {method: sum(map(compare.has_collapsed, group)) for method, group in mrpc.items()}
    of_twenty = "{vanilla}, {f} and {d} of twenty of AdamW, F and D, {lora} of LoRA; of five each, "
    of_five = (
        "{frozen} of the frozen encoder, {d-random} and {d-lowest} of the two other child networks, "
        "{frozen-embeddings} and {vanilla-sqrtp} of AdamW with frozen embeddings"
    )
    assert (of_twenty + of_five).format(**bad) in PAGE
    assert set(re.findall(r"{(.+?)}", of_twenty + of_five)) == {name for name, count in bad.items() if count}
    assert all(len(mrpc[name]) == 5 for name in re.findall(r"{(.+?)}", of_five))


def test_what_it_says_of_300_examples_is_what_the_runs_say():
    tasks = reported("finetune-300")
    f, d, lora = (
        compare.difference_to(tasks["glue/stsb"]["vanilla"], tasks["glue/stsb"][m]) for m in ("f", "d", "lora")
    )
    assert f"on STS-B F {f}, D {d}, LoRA {lora}." in PAGE
    few = tasks["glue/mrpc"]
    f, d, lora = (compare.difference_to(few["vanilla"], few[method]) for method in ("f", "d", "lora"))
    assert f"F has {f} there, D {d} and LoRA {lora}." in PAGE
    every = [run for group in few.values() for run in group]
    near = sum(abs(runs.score(run) - run["constant_score"]) <= compare.MARGIN for run in every)
    assert f"{near} of {len(every)} runs end within a point of the best constant prediction, one answer" in PAGE


def test_what_it_says_of_intervals_is_what_the_runs_say():
    """By how many seeds F on STS-B and D on MRPC are told from AdamW, and for how many comparisons that holds."""
    tasks = reported("finetune")

    def told(task, method, seeds=20, comparisons=1):
        first = [run for run in tasks[task][method] if run["seed"] < seeds]
        found = compare.difference_to(tasks[task]["vanilla"], first)
        half = (found.high - found.mean) * t.ppf(1 - 0.025 / comparisons, seeds - 1) / t.ppf(0.975, seeds - 1)
        return abs(found.mean) > half

    assert (
        "by five neither F on STS-B nor D on MRPC could be told from AdamW; F could from ten on, D by all twenty"
        in PAGE
    )
    assert [told("glue/stsb", "f", seeds) for seeds in range(5, 21)] == [False] * 5 + [True] * 11
    assert [told("glue/mrpc", "d", seeds) for seeds in range(5, 21)] == [False] * 15 + [True]
    assert (
        "leaves out 0 by less than 0.01; corrected for even two comparisons it would not, where F's and D's on" in PAGE
    )
    assert -0.01 < compare.difference_to(tasks["glue/mrpc"]["vanilla"], tasks["glue/mrpc"]["d"]).high < 0
    assert not told("glue/mrpc", "d", comparisons=2)
    assert told("glue/stsb", "f", comparisons=6)
    assert told("glue/stsb", "d", comparisons=6)


def test_what_it_says_of_a_fisher_pass_is_what_the_runs_say():
    tasks = reported("finetune")
    seconds = [median(run["fisher_seconds"] for run in methods["d"]) for methods in tasks.values()]
    assert f"here {min(seconds):.0f} to {max(seconds):.0f} seconds, almost what an epoch" in PAGE


def test_what_it_says_of_reserve_p_and_fisher_batches_is_what_the_runs_say():
    """Over the same five seeds; also what docs/fisher.md says of them."""
    methods = reported("finetune")["glue/stsb"]
    whole = {name: methods[name] for name in ("vanilla", "f", "d")}
    methods = {name: [run for run in group if run["seed"] < 5] for name, group in methods.items()}
    of_fisher = " ".join((README.parent / "docs" / "fisher.md").read_text(encoding="utf-8").split())
    shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    rows = [["p", *(f"{p:g}" for p in shares)], ["---", *["--:"] * len(shares)]]
    found = {}
    for name, title in (("f", "F"), ("d", "D")):
        of = [methods[name if p == 0.3 else f"{name}-p{p:g}"] for p in shares]
        assert all(len(group) == 5 for group in of)
        found[name] = [compare.difference_to(methods["vanilla"], group) for group in of]
        rows += [[title, *map(str, found[name])], ["its rate", *(f"{group[0]['lr']:.2g}" for group in of)]]
    table = " ".join(f"| {' | '.join(row)} |" for row in rows)
    assert table.replace("| --- | --: |", "|---|--:|").replace(" --: |", "--:|") in PAGE
    best = sorted(zip(found["d"], shares, strict=True), reverse=True)[:3]
    assert sorted(p for _, p in best) == [0.1, 0.2, 0.3], "D did best at 0.1 to 0.3"
    wider = t.ppf(1 - 0.025 / 12, 4) / t.ppf(0.975, 4)
    assert all(abs(one.mean) < wider * (one.high - one.mean) for one in found["f"] + found["d"]), "none excludes 0"
    f, d = (compare.difference_to(whole["vanilla"], whole[name]) for name in ("f", "d"))
    assert (f.seeds, d.seeds) == (20, 20)
    assert f"over twenty, F at 0.3 has {f.mean:+.1f} and D {d.mean:+.1f}." in PAGE
    one, four, sixteen = (compare.difference_to(methods["d"], methods[f"d-{n}-batches"]) for n in (1, 4, 16))
    assert f"by {one}, {four} and {sixteen}: with four" in PAGE
    assert f"by {one}, {four} and {sixteen} points" in of_fisher
    assert four.low > -0.1, "nor a loss larger than 0.1"
    seconds = (median(run["fisher_seconds"] for run in methods[name]) for name in ("d-4-batches", "d-p0.1"))
    assert "took {:.1f} seconds instead of {:.0f},".format(*seconds) in PAGE
    at_random, lowest = (compare.difference_to(methods["d"], methods[f"d-{which}"]) for which in ("random", "lowest"))
    assert f"a random child network has {at_random}, the lowest scores have {lowest}." in of_fisher


def differences_of_d(folder):
    """Of D to the AdamW in a folder, on SICK and on other data sets of its task, as the README writes them."""
    task = "transfer/sick_nli"
    vanilla = reported(folder)[task]["vanilla"]
    d = reported("domains")[task]["d"]
    texts = [f"{compare.difference_to(vanilla, d)} on SICK"]
    for name in ("SNLI", "SciTail", "Quora"):
        paired = compare.difference_to(
            vanilla, d, lambda run, name=name: run["domains"][f"transfer/{name.lower()}"]["accuracy"]
        )
        texts.append(f"{paired} on {name}")
    return texts


def test_what_it_says_of_other_tasks_is_what_the_runs_say():
    methods = reported("heads")["glue/mrpc"]
    names = {"glue/cola": "CoLA", "glue/stsb": "STS-B", "glue/qnli": "QNLI", "transfer/quora": "Quora"}
    for task, name in names.items():

        def score(run, task=task):
            return next(iter(run["heads_on"][task].values()))

        own = 100 * mean(map(score, methods["vanilla"]))
        assert f"{own:.1f} ({next(iter(methods['vanilla'][0]['heads_on'][task]))})" in PAGE
        for method in ("f", "d", "lora", "frozen"):
            paired = compare.difference_to(methods["vanilla"], methods[method], score)
            assert f"{paired} on {name}" in PAGE, (method, f"{paired} on {name}")


def test_what_it_says_of_other_data_sets_is_what_the_runs_say():
    for text in differences_of_d("domains") + differences_of_d("domains-at-ds-rate"):
        assert text in REST
    for text in differences_of_d("domains"):
        assert text in VERDICT or "SICK" in text or "SciTail" in text
