"""A sweep searches by its rule, is not repeated, and continues after being killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_runs import SPEC, record_of

from benchmarks.finetune import methods, model, runs, sweep

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = methods.Settings(lr=0.2, head_lr=0.4, reserve_p=0.25)


def plan_of(names, **options):
    return sweep.Plan([SPEC], names, SETTINGS, **options)


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
