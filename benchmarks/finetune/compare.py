"""The report of a sweep: tables of scores over seeds, of what the search tried and of costs; `pictures` draws it.

It reads nothing but the records of finished runs (see `runs`).
"""

import math
from statistics import mean, median, stdev
from typing import NamedTuple

from ..markdown import markdown
from . import runs
from .methods import METHODS
from .report import COSTS, cost_cells
from .sources import UserError

MARGIN = 0.01  # a run that scores no more than this above the best constant prediction has collapsed
BASELINE = "vanilla"
SEARCHED = (
    "How learning rates were chosen. These scores are of other examples than dev, taken from the training file, and of "
    "other seeds: they compare rates, not methods, and are not comparable with the scores above."
)


def by_task(records, part):
    """Returns {task: {method: its records, by seed}} of one part, methods in the order of `METHODS`.

    Raises:
        UserError: runs of one task differ in what must be equal: data, model, settings, and in the part "report" a
            method's learning rate.
    """
    tasks = {}
    for record in sorted(
        records, key=lambda r: (r["spec"]["task"], list(METHODS).index(r["method"]), r["lr"], r["seed"])
    ):
        if record["spec"]["part"] == part:
            tasks.setdefault(record["spec"]["task"], {}).setdefault(record["method"], []).append(record)
    for task, methods in tasks.items():
        # heads alone may have been searched with settings of their own, so that searches are alike within a method
        for alike in methods.values() if part == "tune" else [[r for group in methods.values() for r in group]]:
            found = {(runs.blank(r["spec"]), r["data"]["fingerprint"]) for r in alike}
            if len(found) > 1:
                raise UserError(
                    f"{task}: the runs are of {len(found)} different sweeps (other data, model, limit or settings); "
                    "report each from a folder of its own"
                )
        for method, group in methods.items():
            rates = sorted({record["lr"] for record in group})
            if part == "report" and len(rates) > 1:
                raise UserError(
                    f"{task}: {method} was run at {' and '.join(f'{rate:.3g}' for rate in rates)}, as after a second "
                    "search; report each from a folder of its own"
                )
    return tasks


def has_collapsed(record):
    """Tells whether a run has learned nothing: at most `MARGIN` above the best constant prediction."""
    return runs.score(record) <= record["constant_score"] + MARGIN


class Difference(NamedTuple):
    """The mean difference of scores, times 100, its interval, and how many seeds were paired."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self):
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference_to(baseline, group, score=runs.score):
    """Returns the mean difference of scores to a baseline, paired by seed, with Student's interval of 95 %.

    Args:
        baseline: records.
        group: records of another method.
        score: function that returns the score of a record (default: the one after the last step).

    Returns:
        A `Difference`; None with fewer than two seeds in common.
    """
    from scipy.stats import t

    scores = {record["seed"]: score(record) for record in baseline}
    differences = [100 * (score(r) - scores[r["seed"]]) for r in group if r["seed"] in scores]
    count = len(differences)
    if count < 2:
        return None
    middle, half = mean(differences), t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
    return Difference(middle, middle - half, middle + half, count)


def score_table(methods):
    """Returns the table of one task's scores over seeds."""
    name, second = next(iter(methods.values()))[0]["curve"][-1][1]
    head = ["method", "lr", "seeds", f"{name}: mean", "sd", "median", "worst", "collapsed", "to AdamW [95 %]", second]
    rows = []
    for method, group in methods.items():
        scores = [100 * runs.score(record) for record in group]
        paired = None if method == BASELINE else difference_to(methods.get(BASELINE, []), group)
        rows.append([
            METHODS[method].title,
            f"{group[0]['lr']:.2g}",
            str(len(group)),
            f"{mean(scores):.1f}",
            f"{stdev(scores):.1f}" if len(scores) > 1 else "",
            f"{median(scores):.1f}",
            f"{min(scores):.1f}",
            str(sum(map(has_collapsed, group))),
            str(paired or ""),
            f"{100 * mean(record['curve'][-1][1][second] for record in group):.1f}",
        ])  # fmt: skip
    return markdown(head, rows)


def partner_table(methods):
    """Returns the table of differences between methods that differ in one option alone; None without such methods."""
    rows = []
    for method, group in methods.items():
        partner = METHODS[method].partner
        paired = difference_to(methods.get(partner, []), group)
        if paired:
            rows.append([
                METHODS[method].title,
                METHODS[partner].title,
                str(paired.seeds),
                f"{paired.mean:+.3f}",
                f"[{paired.low:+.3f}, {paired.high:+.3f}]",
                f"{paired.high - paired.mean:.3f}",
            ])  # fmt: skip
    head = ["method", "at the same rate, to", "seeds", "mean difference", "95 %", "half width"]
    return markdown(head, rows) if rows else None


def search_table(methods):
    """Returns the table of one task's search: each learning rate's mean score, the best in bold."""
    rows = []
    for method, group in methods.items():
        by_rate = {}
        for record in group:
            by_rate.setdefault(record["lr"], []).append(100 * runs.score(record))
        means = {rate: mean(scores) for rate, scores in sorted(by_rate.items())}
        best = max(means, key=means.get)
        cells = [f"{'**' * (rate == best)}{rate:.2g}: {m:.1f}{'**' * (rate == best)}" for rate, m in means.items()]
        at_end = " (at an end)" if best in (min(means), max(means)) else ""
        rows.append([METHODS[method].title, ", ".join(cells) + at_end])
    return markdown(["method", "learning rate: score on the examples set aside"], rows)


def cost_table(methods):
    """Returns the table of what the methods cost on one task: medians over the runs."""
    rows = []
    for method, group in methods.items():
        own, whole = (median(r[name] for r in group) for name in ("optimizer_seconds", "step_seconds"))
        rows.append([METHODS[method].title, *cost_cells(group, own, whole)])
    return markdown(["method", *COSTS], rows)


def elsewhere_table(methods, key):
    """Returns the table of what the methods' models scored on other tasks, or None.

    A cell has mean and standard deviation, and the difference to AdamW as `difference_to` returns it.

    Args:
        methods: {method: records}.
        key: "domains" or "heads_on".
    """
    names = list(next(iter(methods.values()))[0].get(key, {}))
    if not names:
        return None
    rows = []
    for method, group in methods.items():
        cells = []
        for name in names:

            def score(record, name=name):
                return next(iter(record[key][name].values()))

            scores = [100 * score(record) for record in group]
            spread = f" ({stdev(scores):.1f})" if len(scores) > 1 else ""
            paired = None if method == BASELINE else difference_to(methods.get(BASELINE, []), group, score)
            cells.append(f"{mean(scores):.1f}{spread}" + (f", {paired}" if paired else ""))
        rows.append([METHODS[method].title, *cells])
    title = {"domains": "scored as it is on", "heads_on": "encoder frozen, a head trained on"}[key]
    return markdown([title, *names], rows)


def tables(records):
    """Returns the report as Markdown."""
    reported, searched = by_task(records, "report"), by_task(records, "tune")
    parts = ["# Fine-tuning, compared", _about(records)]
    for task in dict.fromkeys([*reported, *searched]):
        parts.append(f"## {task}")
        if task in reported:
            first = next(iter(reported[task].values()))[0]
            parts.append(
                f"{first['data']['train']} training examples, scored on {first['scored']} of dev; the best constant "
                f"prediction scores {100 * first['constant_score']:.1f}. Data {first['data']['fingerprint']}."
            )
            elsewhere = [elsewhere_table(reported[task], key) for key in ("domains", "heads_on")]
            beside = [partner_table(reported[task]), *elsewhere]
            parts += [score_table(reported[task]), *filter(None, beside), cost_table(reported[task])]
        if task in searched:
            parts += [SEARCHED, search_table(searched[task])]
    return "\n\n".join(parts)


def _about(records):
    spec, versions = records[0]["spec"], records[0]["versions"]
    settings = ", ".join(f"{name} {value}" for name, value in spec["settings"])
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{spec['model']}; {settings}. {installed}.\n\nScores are times 100, after the last step. A run has collapsed "
        f"if it scores at most {100 * MARGIN:.0f} point more than the best constant prediction. Differences to AdamW "
        "are paired by seed, with Student's intervals of 95 %, over the seeds that both have; means of unlike numbers "
        "of seeds are not comparable. Times are medians over the runs, which may have shared their machine with each "
        "other and with more; a dash stands for what is not done, or was not measured."
    )
