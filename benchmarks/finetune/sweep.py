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
    centre = METHODS[method].centre(METHODS[method].own(settings))
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
                runs.of_search(replace(spec, method=method, lr=rate, seed=TUNING_SEED + i))
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
    if METHODS[method].fixed:
        return METHODS[method].fixed, []
    if METHODS[method].rate_of is None:
        missing, scores = search(folder, spec, method, plan)
        return (None, missing) if missing else (max(scores, key=scores.get), [])
    other, factor = METHODS[method].rate_of
    rate, missing = chosen_rate(folder, spec, other, plan)
    return (None, missing) if missing else (rate * factor(plan.settings), [])


def finished(folder, plan):
    """Returns the records of a sweep's runs that are there."""
    given = [replace(spec, method=one, part="report") for spec, one in itertools.product(plan.specs, plan.methods)]
    ours = {(spec.part, runs.blank(vars(spec))) for one in given for spec in (one, runs.of_search(one))}
    records = runs.read_all(folder)
    return [one for one in records if (one["spec"]["part"], runs.blank(one["spec"])) in ours]


def pending(folder, plan):
    """Returns the specifications of all runs that can be run now and are not yet there, seed by seed."""
    found = {}
    for spec, method in itertools.product(plan.specs, plan.methods):
        rate, missing = chosen_rate(folder, spec, method, plan)
        if not missing:
            reported = [replace(spec, method=method, lr=rate, seed=seed, part="report") for seed in range(plan.seeds)]
            missing = [one for one in reported if runs.read(folder, one) is None]
        found.update(dict.fromkeys(missing))
    return sorted(found, key=lambda one: (one.part == "report", one.seed))


def to_come(folder, plan):
    """Returns how many runs are still to come; one more for each search that goes beyond its ends."""
    rates = [chosen_rate(folder, spec, method, plan)[0] for spec, method in itertools.product(plan.specs, plan.methods)]
    return len(pending(folder, plan)) + plan.seeds * rates.count(None)


def sweep(folder, plan, start, jobs, minutes=math.inf, show=print, watch=lambda under_way: None, begin=None):
    """Runs what is not yet there, until all is, or the time is up; then the runs under way are finished.

    Args:
        folder: where the runs' files are.
        plan: a `Plan`.
        start: from a `runs.Spec` to nothing; runs it and writes its file. It is called in other processes.
        jobs: how many processes.
        minutes: after which no further run begins.
        show: told a line about each finished run.
        watch: told every second which specifications are under way.
        begin: (function, arguments) called first in each of the processes.

    Returns:
        Whether everything is there.
    """
    deadline = time.monotonic() + 60 * minutes
    function, arguments = begin or (None, ())
    with ProcessPoolExecutor(jobs, get_context("spawn"), function, arguments) as pool:
        running = {}
        try:
            while True:
                ready = [spec for spec in pending(folder, plan) if spec not in running.values()]
                for spec in ready[: jobs - len(running)] if time.monotonic() < deadline else ():
                    running[pool.submit(start, spec)] = spec
                if not running:
                    return not ready
                while not (done := wait(running, timeout=1, return_when=FIRST_COMPLETED).done):
                    watch(list(running.values()))
                for future in done:
                    future.result()
                    show(_line(runs.read(folder, running.pop(future))))
        except BaseException:  # an error, or Ctrl-C: nobody waits for the runs under way
            for process in active_children():
                process.terminate()
            raise


def _line(record):
    spec = record["spec"]
    return (
        f"{spec['task']} {spec['method']} {spec['part']} lr {spec['lr']:.3g} seed {spec['seed']}: "
        f"{100 * runs.score(record):.1f} after {record['seconds']:.0f} s"
    )
