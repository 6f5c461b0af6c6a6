"""The experiment: every method finds a learning rate of its own, by one rule, and is then run with every seed.

A method has three learning rates, half, once and twice its centre (`methods.Method.centre`), and tries each with the
same seeds, which the report does not use, scored on training examples that were set aside, never on dev. If the best is
the lowest or the highest, one more is tried beyond it. The best then runs with the report's seeds, scored on dev.
`vanilla-sqrtp` has no search: it is AdamW at sqrt(p) times the learning rate that F chose, from which F is to be told
apart.
"""

import itertools
import math
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from statistics import mean

from . import runs
from .methods import METHODS

FACTORS = (0.5, 1.0, 2.0)
TUNING_SEED = 1000  # the first seed of the search; the report's count from 0


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        specs: for each task, a `runs.Spec` whose method, learning rate, seed and part are still to be filled in.
        methods: keys of `methods.METHODS`.
        settings: the `methods.Settings` of all runs.
        seeds: how many seeds the report has.
        tuning_seeds: how many the search has.
    """

    specs: list[runs.Spec]
    methods: list[str]
    settings: object
    seeds: int = 5
    tuning_seeds: int = 1


def rates_to_try(method, settings, scores):
    """Returns the learning rates of a method's search, given what those tried have scored.

    Args:
        method: a key of `METHODS`.
        settings: `methods.Settings`.
        scores: {learning rate: mean score}; of none, one or more.

    Returns:
        The first three; or those and one more beyond the best, if that is at an end of the three.
    """
    centre = METHODS[method].centre(settings)
    first = [factor * centre for factor in FACTORS]
    if not all(rate in scores for rate in first):
        return first
    best = max(first, key=scores.get)
    beyond = {first[0]: [first[0] / 2], first[-1]: [first[-1] * 2]}
    return first + beyond.get(best, [])


def search(folder, spec, method, plan):
    """Returns the specifications of a method's search that are still to run, and its scores so far."""
    scores = {}
    while True:
        wanted = rates_to_try(method, plan.settings, scores)
        missing = []
        for rate in wanted:
            own = [
                replace(spec, method=method, lr=rate, seed=TUNING_SEED + i, part="tune")
                for i in range(plan.tuning_seeds)
            ]
            records = [runs.read(folder, one) for one in own]
            missing += [one for one, record in zip(own, records, strict=True) if record is None]
            if None not in records:
                scores[rate] = mean(runs.score(record) for record in records)
        if missing or len(wanted) == len(rates_to_try(method, plan.settings, scores)):
            return missing, scores


def chosen_rate(folder, spec, method, plan):
    """Returns the learning rate that a method is reported with, or the runs of the search that it waits for."""
    if METHODS[method].rate_of is None:
        missing, scores = search(folder, spec, method, plan)
        return (None, missing) if missing else (max(scores, key=scores.get), [])
    other, factor = METHODS[method].rate_of
    rate, missing = chosen_rate(folder, spec, other, plan)
    return (None, missing) if missing else (rate * factor(plan.settings), [])


def most_runs(plan):
    """Returns how many runs a sweep has at most."""
    searching = {METHODS[method].rate_of[0] if METHODS[method].rate_of else method for method in plan.methods}
    of_task = plan.tuning_seeds * (len(FACTORS) + 1) * len(searching) + plan.seeds * len(plan.methods)
    return len(plan.specs) * of_task


def finished(folder, plan):
    """Returns the records of a sweep's runs that are there."""
    ours = {replace(spec, method="", lr=0.0, seed=0, part="") for spec in plan.specs}
    return [record for record in runs.read_all(folder) if runs.blank(record) in ours]


def pending(folder, plan):
    """Returns the specifications of all runs that can be run now and are not yet there, without repetition."""
    found = {}
    for spec, method in itertools.product(plan.specs, plan.methods):
        rate, missing = chosen_rate(folder, spec, method, plan)
        if not missing:
            reported = [replace(spec, method=method, lr=rate, seed=seed, part="report") for seed in range(plan.seeds)]
            missing = [one for one in reported if runs.read(folder, one) is None]
        found.update(dict.fromkeys(missing))
    return list(found)


def sweep(folder, plan, start, jobs, minutes=math.inf, show=print, begin=None):
    """Runs what is not yet there, until all is, or the time is up; then the runs under way are finished.

    Args:
        folder: where the runs' files are.
        plan: a `Plan`.
        start: from a `runs.Spec` to nothing; runs it and writes its file. It is called in other processes.
        jobs: how many processes.
        minutes: after which no further run begins.
        show: told a line about each finished run.
        begin: called first in each of the processes.

    Returns:
        Whether everything is there.
    """
    deadline = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=begin) as pool:
        running = {}
        try:
            while True:
                ready = [spec for spec in pending(folder, plan) if spec not in running.values()]
                for spec in ready[: jobs - len(running)] if time.monotonic() < deadline else ():
                    running[pool.submit(start, spec)] = spec
                if not running:
                    return not ready
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    show(_line(runs.read(folder, running.pop(future)), len(ready)))
        except BaseException:  # an error, or Ctrl-C: nobody waits for the runs under way
            for process in active_children():
                process.terminate()
            raise


def _line(record, ready):
    spec = record["spec"]
    return (
        f"{spec['task']} {spec['method']} {spec['part']} lr {spec['lr']:.3g} seed {spec['seed']}: "
        f"{100 * runs.score(record):.1f} after {record['seconds']:.0f} s; {ready} more to run now"
    )
