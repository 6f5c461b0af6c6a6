"""A sweep searches by its rule, is not repeated, continues after being killed; and what the report makes of it."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.finetune import compare, methods, model, pictures, runs, sweep
from benchmarks.finetune.sources import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = methods.Settings(lr=0.2, head_lr=0.4, reserve_p=0.25)
SPEC = runs.Spec("task", "", 0.0, 0, "", "model", 32, (("batch_size", 16), ("epochs", 3), ("reserve_p_d", 0.3)))


def plan_of(names, **options):
    return sweep.Plan([SPEC], names, SETTINGS, **options)


def record_of(spec, score, constant=0.5, **more):
    """The record of a run as a worker writes it."""
    return {
        "method": spec.method,
        "seed": spec.seed,
        "lr": spec.lr,
        "curve": [[2, {"accuracy": 0.1, "macro F1": 0.0}], [4, {"accuracy": score, "macro F1": 0.25}]],
        "seconds": 1.0,
        "optimizer_seconds": 0.01,
        "step_seconds": 0.1,
        "fisher_seconds": None,
        "selection_seconds": None,
        "optimizer_bytes": 8_000_000,
        "density": None,
        "constant_score": constant,
        "scored": 100,
        "data": {"fingerprint": "abc", "train": 32},
        "versions": {"python": "3"},
        **more,
    }


def play(folder, plan, score):
    """Runs a sweep in this process, with scores from a function; returns the specifications in order."""
    order = []
    while ready := sweep.pending(folder, plan):
        order.append(ready[0])
        runs.write(folder, ready[0], record_of(ready[0], score(ready[0])))
    return order


# The search


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.2, [0.1, 0.2, 0.4]), (0.4, [0.1, 0.2, 0.4, 0.8]), (0.1, [0.1, 0.2, 0.4, 0.05]), (0.8, [0.1, 0.2, 0.4, 0.8])],
)
def test_a_method_tries_three_rates_and_one_beyond_the_best(tmp_path, best, tried):
    order = play(tmp_path, plan_of(["vanilla"], seeds=2), lambda spec: 1 - abs(spec.lr - best))
    assert [spec.lr for spec in order if spec.part == "tune"] == tried
    assert [(spec.lr, spec.seed) for spec in order if spec.part == "report"] == [(best, 0), (best, 1)]


def test_the_search_has_seeds_of_its_own_and_goes_by_their_mean(tmp_path):
    scores = {(0.1, 1000): 0.9, (0.1, 1001): 0.1, (0.2, 1000): 0.6, (0.2, 1001): 0.6}
    plan = plan_of(["d"], seeds=1, tuning_seeds=2)
    order = play(tmp_path, plan, lambda spec: scores.get((spec.lr, spec.seed), 0.0))
    assert {spec.seed for spec in order if spec.part == "tune"} == {1000, 1001}
    assert [spec.lr for spec in order if spec.part == "report"] == [0.2]


def test_sqrtp_takes_what_f_found(tmp_path):
    order = play(tmp_path, plan_of(["vanilla-sqrtp"], seeds=1), lambda spec: -abs(spec.lr - 0.4))
    assert [spec.method for spec in order] == ["f", "f", "f", "vanilla-sqrtp"]
    assert order[-1].lr == 0.4 * 0.5


def test_8_bit_state_takes_the_rate_of_float32_as_it_is(tmp_path):
    order = play(tmp_path, plan_of(["d-8bit"], seeds=1), lambda spec: -abs(spec.lr - 0.4))
    assert [(spec.method, spec.part) for spec in order[-2:]] == [("d", "tune"), ("d-8bit", "report")]
    assert order[-1].lr == 0.4


def test_every_method_has_as_many_runs(tmp_path):
    plan = plan_of(list(methods.METHODS), seeds=2)
    order = play(tmp_path, plan, lambda spec: -spec.lr)
    for method in methods.METHODS:
        parts = [spec.part for spec in order if spec.method == method]
        assert parts.count("report") == 2
        assert parts.count("tune") == (4 if methods.METHODS[method].centre else 0)
    assert [spec.seed for spec in order[-4:]] == [1] * 4  # so that a sweep that was stopped has all methods' seeds
    assert len(sweep.finished(tmp_path, plan)) == len(order)
    assert sweep.finished(tmp_path, replace(plan, specs=[replace(SPEC, limit=33)])) == []


def test_what_is_to_come_is_known_from_the_beginning(tmp_path):
    plan = plan_of(["vanilla", "f", "vanilla-sqrtp", "frozen-slow"], seeds=2)
    assert sweep.to_come(tmp_path, plan) == 2 * 3 + 4 * 2
    order = play(tmp_path, plan, lambda spec: -abs(spec.lr - METHOD_CENTRES[spec.method]))
    assert len(order) == 2 * 3 + 4 * 2
    assert sweep.to_come(tmp_path, plan) == 0


METHOD_CENTRES = {"vanilla": 0.2, "f": 0.4, "vanilla-sqrtp": 0.0, "frozen-slow": 0.0}


def test_a_fixed_rate_is_not_searched(tmp_path):
    order = play(tmp_path, plan_of(["frozen-slow"], seeds=2), lambda spec: 0.5)
    assert [(spec.part, spec.lr) for spec in order] == [("report", 2e-5)] * 2


def test_a_variant_searches_with_its_own_p(tmp_path):
    order = play(tmp_path, plan_of(["f-p0.05"], seeds=1), lambda spec: 0.5)
    assert [spec.lr for spec in order[:3]] == pytest.approx([x * 0.2 / 0.05**0.5 for x in (0.5, 1, 2)])


def test_searches_are_shared_by_sweeps_that_differ_only_afterwards(tmp_path):
    """Other domains, heads elsewhere and epochs of heads do not change how a whole model's rate is chosen."""
    play(tmp_path, plan_of(["vanilla", "frozen"], seeds=1), lambda spec: 0.5)
    settings = tuple(sorted([*SPEC.settings, ("domains", "a b"), ("head_epochs", 9), ("heads_on", "c")]))
    plan = replace(plan_of(["vanilla", "frozen"], seeds=1), specs=[replace(SPEC, settings=settings)])
    order = play(tmp_path, plan, lambda spec: 0.5)
    assert [(spec.method, spec.part) for spec in order if spec.part == "tune"] == [("frozen", "tune")] * 4
    assert [spec.part for spec in order].count("report") == 2


def test_settings_that_came_later_leave_old_runs_their_names():
    old = {"lr", "head_lr", "reserve_p", "reserve_p_d", "weight_decay", "epochs", "batch_size", "max_length", "warmup"}
    old |= {"max_grad_norm", "evaluations"}
    assert {name for name, _ in methods.Settings().identity()} == old
    later = methods.Settings(pooling="first", head_epochs=3)
    assert set(later.identity()) - set(methods.Settings().identity()) == {("pooling", "first"), ("head_epochs", 3)}


# Files


def test_a_file_is_found_by_all_of_the_specification(tmp_path):
    spec = replace(SPEC, method="f", lr=0.1, seed=3, part="tune")
    runs.write(tmp_path, spec, record_of(spec, 0.5))
    assert runs.score(runs.read(tmp_path, spec)) == 0.5
    for other in ({"lr": 0.2}, {"seed": 4}, {"part": "report"}, {"model": "x"}, {"limit": None}, {"settings": ()}):
        assert runs.read(tmp_path, replace(spec, **other)) is None
    assert [path.name for path in tmp_path.iterdir()] == [spec.file_name()]  # and nothing unfinished


# The command, killed and continued

SEEDS = 12


def command(folder, *more):
    arguments = ["--tasks", "docstrings:40", "--methods", "frozen", "--limit", "32", "--seeds", str(SEEDS)]
    arguments += ["--epochs", "1", "--max-length", "12", "--out", str(folder), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.finetune", "run", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, status=0):
    """Waits for the command and returns what it printed."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == status, printed
    return printed


def scores_in(folder):
    return {path.name: runs.json.loads(path.read_text())["curve"] for path in (folder / "runs").glob("*.json")}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(model.PACKAGED) is None, reason="needs the packaged model")
def test_a_killed_sweep_continues_and_gives_the_same_numbers(tmp_path):
    finish(command(tmp_path / "whole"))
    killed = command(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while len(scores_in(tmp_path / "killed")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(scores_in(tmp_path / "killed")) < SEEDS
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "runs").glob("*.json")}
    finish(command(tmp_path / "killed"))
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert scores_in(tmp_path / "killed") == scores_in(tmp_path / "whole")
    finish(command(tmp_path / "killed", "--budget-minutes", "0"))


@pytest.mark.slow
def test_without_time_nothing_begins(tmp_path):
    assert "the same command continues" in finish(command(tmp_path, "--budget-minutes", "0"), status=3)
    assert list(tmp_path.iterdir()) == []


# The report


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
