"""What a comparison leaves behind: scores, one table, pictures, and a JSON file with every number behind them."""

import json
import math
import platform
from importlib import metadata
from statistics import mean, median, stdev

from ..markdown import markdown
from .methods import METHODS

# Colours that remain apart for colour-blind readers (Okabe and Ito), one per method.
COLOURS = {
    "frozen": "#7f7f7f",
    "frozen-slow": "#000000",
    "frozen-embeddings": "#BBBBBB",
    "vanilla": "#0072B2",
    "vanilla-sqrtp": "#56B4E9",
    "f": "#D55E00",
    "d": "#009E73",
    "f-8bit": "#A34600",
    "d-8bit": "#005C43",
    "d-random": "#E69F00",
    "d-lowest": "#CC79A7",
    "lora": "#F0E442",
}
COSTS = ["features s", "Fisher s", "selection s", "optimizer ms/step", "of step time", "state MB"]
PACKAGES = ("childtune-fast", "torch", "transformers", "tokenizers", "numpy")


def versions():
    """Returns {name: version} of Python, the machine and the packages that a result depends on."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    installed = {(dist.name or "").lower(): dist.version for dist in metadata.distributions()}
    return found | {package: installed.get(package, "not installed") for package in PACKAGES}


def by_method(runs):
    """Returns {method: its runs}, in the order in which methods first occur."""
    groups = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return groups


def final_scores(runs, metric):
    """Returns the score of each run after its last step: not its best one, which would flatter."""
    return [run["curve"][-1][1][metric] for run in runs]


def describe_task(task):
    """Returns a few lines on the data: sizes, fingerprint, examples per label."""
    lines = [f"task: {task.name}, {len(task.train)} train, {len(task.dev)} dev, fingerprint {task.fingerprint()}"]
    if task.labels is None:
        return lines[0] + ", regression"
    counts = [f"{label} {train}/{dev}" for label, (train, dev) in task.counts().items()]
    lines += ["  train/dev: " + ", ".join(counts[start : start + 5]) for start in range(0, len(counts), 5)]
    return "\n".join(lines)


def table(runs):
    """Returns the table, as Markdown, that compares the methods.

    Args:
        runs: dicts from `Experiment.run`.
    """
    first, second = runs[0]["curve"][-1][1]
    head = ["method", "lr", first, "sd", "min..max", second]
    head += COSTS
    rows = []
    for name, group in by_method(runs).items():
        scores = [100 * score for score in final_scores(group, first)]
        own, whole = (median(v for run in group for v in run[key]) for key in ("optimizer_seconds", "step_seconds"))
        rows.append([
            METHODS[name].title,
            f"{group[0]['lr']:.1e}",
            f"{mean(scores):.1f}",
            f"{stdev(scores):.1f}" if len(scores) > 1 else "",
            f"{min(scores):.1f}..{max(scores):.1f}",
            f"{100 * mean(final_scores(group, second)):.1f}",
            *cost_cells(group, own, whole),
        ])  # fmt: skip
    return markdown(head, rows)


def cost_cells(runs, optimizer_seconds, step_seconds):
    """Returns the cells of COSTS for the runs of one method, whose steps took so long."""
    return [
        _seconds(runs, "feature_seconds"),
        _seconds(runs, "fisher_seconds"),
        _seconds(runs, "selection_seconds"),
        f"{1e3 * optimizer_seconds:.2f}",
        f"{100 * optimizer_seconds / step_seconds:.0f} %",
        f"{runs[0]['optimizer_bytes'] / 1e6:.1f}",
    ]


def _seconds(runs, key):
    """Returns the median over runs of something that is done once a run, as text; a dash where nothing is."""
    values = [run[key] for run in runs if run.get(key) is not None]  # older runs have no "feature_seconds"
    return f"{median(values):.2f}" if values else "—"


def caveats(runs, task):
    """Returns what a reader must know before taking the table for more than it is."""
    seeds = len({run["seed"] for run in runs})
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    lines = [f"Scores are those after the last step, on {len(task.dev)} dev examples, over {over}."]
    if "accuracy" in runs[0]["curve"][-1][1]:
        score = mean(final_scores(runs, "accuracy"))
        error = 100 * math.sqrt(score * (1 - score) / len(task.dev))
        lines.append(f"The sampling error of one accuracy on that many examples is about {error:.1f} points.")
    lines.append("So few seeds do not separate methods: take a small difference for noise, whichever way it points.")
    return "\n".join(lines)


def colour(method):
    """Returns a method's colour; a variant's is that of the method it varies."""
    return COLOURS.get(method) or COLOURS[method.partition("-")[0]]


def pyplot():
    """Returns matplotlib's pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def picture(runs, task, model, path):
    """Draws the learning curves: dev score against training step, the mean over seeds and the band they span.

    Args:
        runs: dicts from `Experiment.run`.
        task: the `Task` they were trained on.
        model: name of the model, for the title.
        path: file to write.
    """
    plt = pyplot()
    metric = next(iter(runs[0]["curve"][-1][1]))
    seeds = len({run["seed"] for run in runs})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, group in by_method(runs).items():
        steps = [step for step, _ in group[0]["curve"]]
        columns = list(zip(*([100 * scores[metric] for _, scores in run["curve"]] for run in group), strict=True))
        own, style = colour(name), "--" if METHODS[name].frozen else "-"
        label = f"{METHODS[name].title}: {mean(columns[-1]):.1f}"
        axes.plot(steps, [mean(c) for c in columns], style, color=own, marker="o", ms=4, lw=2, label=label)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=own, alpha=0.15, linewidth=0)
    bottom = min(0, axes.get_ylim()[0])  # an axis that starts higher would make little differences look large
    axes.set(xlabel="training step", ylabel=f"dev {metric}, times 100", xlim=(0, None), ylim=(bottom, None))
    band = f"mean of {seeds} seeds, band: lowest to highest" if seeds > 1 else "one seed"
    axes.set_title(f"{model} on {task.name}\n{band}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, title="method: score after the last step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def child_picture(child, task, model, path):
    """Draws the density of a child network by layer and kind of module.

    Args:
        child: the `ChildNetwork` of method `d`.
        task: the `Task` whose training set its Fisher scores come from.
        model: name of the model, for the title.
        path: file to write.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    child.plot(axes)
    layers = [label.get_text().rpartition(".")[2] for label in axes.get_xticklabels()]
    axes.set_xticks(axes.get_xticks(), layers, rotation=0)
    axes.set_xlabel("layer")
    axes.set_title(f"{METHODS['d'].title}, first seed: {model} on {task.name}\n{child!r}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(folder, settings, runs, task, model, child=None, base=None, moved=None):
    """Writes results.json (every number), table.md and pictures into a folder.

    The pictures are curves.png; child.png, of a child network; and spectra-METHOD.png for each in `moved`, which is
    {method: `Spectra` of the transformer after its first run, beside the pretrained one}.
    """
    data = {"name": task.name, "fingerprint": task.fingerprint(), "counts": task.counts()}
    result = {"model": model, "settings": settings, "data": data, "versions": versions(), "runs": runs}
    if base is not None:
        result["spectra"] = {name: found.as_dict() for name, found in {"pretrained": base, **(moved or {})}.items()}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"{describe_task(task)}\n\n{table(runs)}\n\n{caveats(runs, task)}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    picture(runs, task, model, folder / "curves.png")
    if child is not None:
        child_picture(child, task, model, folder / "child.png")
    for name, found in (moved or {}).items():
        if len(found):
            found.plot(folder / f"spectra-{name}.png")
