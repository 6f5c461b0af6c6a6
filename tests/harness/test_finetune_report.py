"""What the report of a sweep makes of its runs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_runs import SPEC, record_of

from benchmarks.finetune import compare, pictures, runs
from benchmarks.finetune.sources import UserError

ROOT = Path(__file__).resolve().parents[2]


def reported(method, scores, lr=0.1, **more):
    specs = [replace(SPEC, method=method, lr=lr, seed=seed, part="report") for seed in range(len(scores))]
    return [(spec, record_of(spec, score, **more)) for spec, score in zip(specs, scores, strict=True)]


def written(folder, *groups):
    for spec, record in (pair for group in groups for pair in group):
        runs.write(folder, spec, record)
    return runs.read_all(folder)


def test_the_tables_say_what_the_runs_scored(tmp_path):
    searched = [replace(SPEC, method="f", lr=lr, seed=1000, part="tune") for lr in (0.1, 0.2)]
    records = written(
        tmp_path,
        reported("vanilla", [0.70, 0.80, 0.50]),
        reported("f", [0.72, 0.82, 0.52], lr=0.2),
        [(spec, record_of(spec, 0.4 + spec.lr)) for spec in searched],
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare.tables(records).splitlines()]
    # 70, 80, 50 deviate by 3.3, 13.3, 16.7 from the mean: sqrt((11.1 + 177.8 + 277.8) / 2) = 15.3; 50 is the constant
    assert ["AdamW", "0.1", "3", "66.7", "15.3", "70.0", "50.0", "1", "", "25.0"] in rows
    assert ["ChildAdamW (F)", "0.2", "3", "68.7", "15.3", "72.0", "52.0", "0", "+2.0 [+2.0, +2.0]", "25.0"] in rows
    assert ["ChildAdamW (F)", "0.1: 50.0, **0.2: 60.0** (at an end)"] in rows
    assert ["AdamW", "—", "—", "—", "10.00", "10 %", "8.0"] in rows
    assert "not comparable with the scores above" in compare.tables(records)


def test_the_tables_say_what_models_scored_elsewhere(tmp_path):
    elsewhere = {"domains": {"x": {"accuracy": 0.25, "macro F1": 0.5}}, "heads_on": {}}
    text = compare.tables(written(tmp_path, reported("f", [0.5, 0.7], **elsewhere)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["scored as it is on", "x"] in rows
    assert ["ChildAdamW (F)", "25.0 (0.0)"] in rows
    assert "head trained on" not in text


def test_differences_elsewhere_are_paired_by_seed(tmp_path):
    there = {seed: {"domains": {"x": {"accuracy": score}}} for seed, score in enumerate((0.2, 0.4, 0.3))}
    records = written(tmp_path, reported("vanilla", [0.5, 0.7, 0.6]), reported("d", [0.5, 0.7, 0.6]))
    for record in records:
        record.update(there[record["seed"]] if record["method"] == "vanilla" else {"domains": {"x": {"accuracy": 0.5}}})
    text = compare.tables(records)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["AdamW", "30.0 (10.0)"] in rows
    assert ["ChildAdamW (D)", "50.0 (0.0), +20.0 [-4.8, +44.8]"] in rows  # 10 * 4.302653 / sqrt(3) = 24.8


def test_differences_are_paired_by_seed():
    vanilla = [record for _, record in reported("vanilla", [0.1, 0.5, 0.9, 0.3])]
    other = [record for _, record in reported("f", [0.2, 0.6, 1.0])]
    mean, low, high, seeds = compare.difference_to(vanilla, other)
    assert seeds == 3  # of the four that one of them has
    assert mean == pytest.approx(10)
    assert low == pytest.approx(10)
    assert high == pytest.approx(10)
    mean, low, high, _ = compare.difference_to(vanilla, [record for _, record in reported("f", [0.1, 0.7, 1.0])])
    assert mean == pytest.approx(10)
    assert high - mean == pytest.approx(4.302653 * 10 / 3**0.5)  # t of 2 degrees of freedom; sd 0.1
    assert mean - low == pytest.approx(high - mean)
    assert compare.difference_to(vanilla, other[:1]) is None


def test_8_bit_state_is_paired_with_float32(tmp_path):
    of = {"f": [0.7, 0.8, 0.6], "f-8bit": [0.72, 0.82, 0.61], "d-8bit": [0.5, 0.6, 0.7]}
    methods = {name: [record for _, record in reported(name, scores)] for name, scores in of.items()}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare.partner_table(methods).splitlines()]
    # 2, 2 and 1 points: their mean is 5/3, their deviation 1/sqrt(3), so that the half width is t / 3
    assert rows[2:] == [["F, 8-bit state", "ChildAdamW (F)", "3", "+1.667", "[+0.232, +3.101]", "1.434"]]
    assert "half width" in compare.tables(written(tmp_path / "both", *(reported(*one) for one in of.items())))
    assert "half width" not in compare.tables(written(tmp_path / "one", reported("f", of["f"])))


def test_runs_of_different_sweeps_are_not_mixed(tmp_path):
    others = [(replace(spec, limit=33), record) for spec, record in reported("f", [0.5])]
    with pytest.raises(UserError, match="2 different sweeps"):
        compare.tables(written(tmp_path, reported("vanilla", [0.5]), others))


def test_one_method_at_two_rates_is_not_averaged(tmp_path):
    with pytest.raises(UserError, match=r"task: f was run at 0\.1 and 0\.2, as after a second search"):
        compare.tables(written(tmp_path, reported("f", [0.5]), reported("f", [0.5, 0.6], lr=0.2)))


def test_searches_of_heads_with_other_epochs_are_not_averaged(tmp_path):
    spec = replace(SPEC, method="frozen", lr=0.1, seed=1000, part="tune")
    other = replace(spec, settings=tuple(sorted([*SPEC.settings, ("head_epochs", 9)])))
    whole = replace(spec, method="vanilla")
    alone = [(one, record_of(one, 0.5)) for one in (whole, other)]
    assert "frozen encoder" in compare.tables(written(tmp_path / "one", alone))
    with pytest.raises(UserError, match="2 different sweeps"):
        compare.tables(written(tmp_path / "two", alone, [(spec, record_of(spec, 0.5))]))


def test_the_pictures_are_drawn(tmp_path):
    density = [["encoder.layer.0", "attention", 3, 10], ["encoder.layer.1", "attention", 5, 10]]
    losses = {"losses": [[2, 0.9, 1.0], [4, 0.5, 0.8]]}
    records = written(
        tmp_path / "runs",
        reported("vanilla", [0.5, 0.6], **losses),
        reported("d", [0.5, 0.7], density=density, **losses),
        reported("d-p0.1", [0.5, 0.7], density=density, **losses),
        reported("f-p0.5", [0.5, 0.7], **losses),
        reported("frozen-slow", [0.5, 0.5], **losses),
        reported("lora", [0.5, 0.5]),  # of a time when no losses were kept
    )
    pictures.pictures(records, tmp_path)
    for name in ("scores", "differences", "curves", "density", "shares", "frozen"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_shares_are_compared_over_the_seeds_that_all_of_them_have(tmp_path):
    """The third seed is one that `f-p0.5` did not run."""
    of = {"vanilla": [0.5, 0.5, 0.9], "f": [0.6, 0.6, 0.1], "f-p0.5": [0.7, 0.8], "d-p0.1": [0.1], "lora": [0.1]}
    records = written(tmp_path, *(reported(name, scores) for name, scores in of.items()))
    shares = pictures._shares(compare.by_task(records, "report")[SPEC.task])
    (p, of_f), (other_p, of_half) = shares.pop("f")
    assert (p, other_p) == (0.3, 0.5)
    assert (of_f.mean, of_f.seeds) == (pytest.approx(10), 2)
    assert (of_half.mean, of_half.seeds) == (pytest.approx(25), 2)
    assert not shares  # of d-p0.1 there is one seed, which would leave no others


def test_the_pictures_of_variants_alone_leave_out_what_they_have_no_part_in(tmp_path):
    records = written(tmp_path / "runs", reported("vanilla-sqrtp", [0.5, 0.6]), reported("f-8bit", [0.5, 0.7]))
    pictures.pictures([one for one in records if one["method"] == "f-8bit"], tmp_path)
    assert not list(tmp_path.glob("*.png"))
    pictures.pictures(records, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png", "scores.png"]


def test_the_pictures_of_scores_are_of_main_methods_alone(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.setdefault(path.name, figure))
    of = {"vanilla": [0.5, 0.6], "f": [0.5, 0.7], "f-8bit": [0.5, 0.7], "f-p0.5": [0.5, 0.7], "d-4-batches": [0.4, 0.3]}
    pictures.pictures(written(tmp_path, *(reported(name, scores) for name, scores in of.items())), tmp_path)
    (scores,), (curves,), (shares,) = (drawn[f"{name}.png"].axes for name in ("scores", "curves", "shares"))
    assert [label.get_text() for label in scores.get_yticklabels()] == ["vanilla", "f"]
    assert curves.get_legend_handles_labels()[1] == ["vanilla", "f"]
    assert shares.get_legend_handles_labels()[1] == ["ChildAdamW (F), 2 seeds"]


def test_a_report_of_nothing_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.finetune", "report", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no finished runs; begin with" in done.stderr
