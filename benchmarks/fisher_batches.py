"""How many batches Fisher scores need: the child network of few batches beside that of a full pass, on MRPC and STS-B.

    python -m benchmarks.fisher_batches --data FOLDER   # measures, 20 minutes of one core, and reports
    python -m benchmarks.fisher_batches                 # reports what was measured: docs/fisher.md's table and picture

FOLDER holds glue/mrpc and glue/stsb as benchmarks/finetune reads them, each as train.tsv.gz and dev.tsv.gz. The model
is all-MiniLM-L6-v2, from its package, with a new head. All scores are those of `estimate_fisher`: it is called for one
part of a pass after another, and the parts are added up by their weights.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from childtune_fast import ChildNetwork, __version__, estimate_fisher
from childtune_fast.child.maskable import maskable_parameters

from .finetune import data, methods, model, train
from .markdown import markdown
from .report import machine_name

RESULTS = Path(__file__).with_name("results") / "fisher_batches.json"
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- python -m benchmarks.fisher_batches: begin -->", "<!-- python -m benchmarks.fisher_batches: end -->"
TASKS = {"glue/mrpc": "MRPC", "glue/stsb": "STS-B"}
FORMULAS = {"batch": "of batches", "example": "of examples"}
SHARES = (0.3, 0.1)
ORDERS = 3
LATER_ORDERS_END = 64  # the mean over all examples has no order, so later orders of "example" need no full pass
SETTINGS = methods.Settings(lr=0.0, head_lr=0.0, epochs=1, max_length=64)
COLOURS = {"batch": "#0072B2", "example": "#D55E00"}

Children = dict[float, ChildNetwork]  # {reserve_p: the child network chosen by the scores so far}
Record = dict[str, Any]


# ---- One pass ------------------------------------------------------------------------------------------------------


def ends(batches: int, last: int | None = None) -> list[int]:
    """Returns the numbers of batches after which a child network is chosen: powers of 2, and all of them."""
    powers = [1 << i for i in range(batches.bit_length()) if 1 << i < batches]
    return [end for end in [*powers, batches] if last is None or end <= last]


def children(
    net: nn.Module,
    order: list[list[int]],
    batch_of: Callable[[list[int]], Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    formula: str,
    last: int | None = None,
    shares: Sequence[float] = SHARES,
) -> Iterator[tuple[int, Children]]:
    """Yields (number of batches, the child networks of these batches) along one pass.

    Args:
        net: the model.
        order: the examples of each batch, by their indices.
        batch_of: from indices to a batch.
        loss: the loss of a model and a batch.
        formula: a key of FORMULAS.
        last: number of batches to end after; None for all.
        shares: values of reserve_p.
    """
    sums: dict[str, torch.Tensor] = {}
    done = 0
    for end in ends(len(order), last):
        part, done = order[done:end], end
        by_example = formula == "example"
        scores = estimate_fisher(net, map(batch_of, part), loss_fn=loss, per_example=by_example, progress=False)
        weight = sum(map(len, part)) if by_example else len(part)
        sums = {name: weight * scores[name] + sums.get(name, 0.0) for name in scores}
        yield end, {p: ChildNetwork.from_scores(net, sums, reserve_p=p) for p in shares}


def overlaps(found: dict[int, Children], full: Children) -> dict[str, dict[str, float]]:
    """Returns {reserve_p: {number of batches: share of the weights that are also in the full pass's child network}}."""
    return {str(p): {str(end): round(of[p].overlap(full[p]), 4) for end, of in found.items()} for p in full}


# ---- The measurement -----------------------------------------------------------------------------------------------


class Task:
    """A task, with the model whose scores are measured on it; weights that are not chosen among are frozen.

    With `limit`, its training examples are those of a sweep of benchmarks/finetune, which sets some aside first.
    """

    def __init__(
        self, name: str, folder: Path, tokenizer: Any, backbone: nn.Module, limit: int | None = None, seed: int = 0
    ) -> None:
        self.task = data.load_task(name, limit=limit, folder=folder, set_aside=limit is not None)
        self.experiment = train.Experiment(tokenizer, backbone, self.task, SETTINGS, torch.device("cpu"))
        outputs = len(self.task.labels) if self.task.labels else 1
        self.net = model.Classifier(backbone, model.Head(backbone.config.hidden_size, outputs, seed))
        masked = maskable_parameters(self.net, None)
        for param_name, param in self.net.named_parameters():
            param.requires_grad_(param_name in masked)
        self.full: dict[tuple[str, int], Children] = {}
        self.record: Record = {
            "examples": len(self.task.train),
            "fingerprint": self.task.fingerprint(),
            "weights": sum(param.numel() for param in masked.values()),
            "overlap": {formula: [] for formula in FORMULAS},
        }

    def batch_of(self, indices: list[int]) -> Any:
        """Returns the tokens and targets of some examples."""
        return self.experiment.tokens["train"].batch(indices), self.experiment.targets["train"][indices]

    def loss(self, net: nn.Module, batch: Any) -> torch.Tensor:
        """Returns the task's loss of a batch."""
        return self.experiment.loss(net(batch[0]), batch[1])

    def run(self, formula: str, seed: int) -> None:
        """Adds one data order to the record."""
        order = list(train.batches(self.experiment.tokens["train"].lengths, SETTINGS, seed))
        last = LATER_ORDERS_END if formula == "example" and seed else None
        found = dict(children(self.net, order, self.batch_of, self.loss, formula, last))
        self.full[formula, seed] = found[len(order)] if last is None else self.full[formula, 0]
        self.record["batches"] = len(order)
        self.record["overlap"][formula].append(overlaps(found, self.full[formula, seed]))
        if formula == "batch":
            of_orders = [self.full["batch", i] for i in range(seed + 1)]
            pairs = [(a, b) for i, a in enumerate(of_orders) for b in of_orders[:i]]
            self.record["between_orders"] = {str(p): [round(a[p].overlap(b[p]), 4) for a, b in pairs] for p in SHARES}
        if ("example", 0) in self.full:
            by_example = self.full["example", 0]
            of_batches = [of for (what, _), of in self.full.items() if what == "batch"]
            both = {str(p): [round(of[p].overlap(by_example[p]), 4) for of in of_batches] for p in SHARES}
            self.record["batch_to_example"] = both


def measure(folder: Path) -> None:
    """Measures all tasks, and writes the results anew after each pass."""
    tokenizer, backbone = model.load_pretrained(model.packaged_model())
    results: Record = {"machine_info": machine(), "datetime": time.strftime("%Y-%m-%dT%H:%M:%S"), "tasks": {}}
    results["settings"] = {
        "model": model.PACKAGED_MODEL,
        "batch_size": SETTINGS.batch_size,
        "max_length": SETTINGS.max_length,
        "childtune_fast": __version__,
    }
    tasks = {name: Task(name, folder, tokenizer, backbone) for name in TASKS}
    begin = time.process_time()
    for seed in range(ORDERS):
        for name, task in tasks.items():
            for formula in FORMULAS:
                task.run(formula, seed)
                results["tasks"][name] = task.record
                results["cpu_seconds"] = round(time.process_time() - begin)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                print(f"order {seed}, {name}, {formula}: {results['cpu_seconds']} s so far", flush=True)


def machine() -> Record:
    """Returns the machine's facts, named as in the results of pytest-benchmark."""
    import cpuinfo

    cpu = {key: value for key, value in cpuinfo.get_cpu_info().items() if key in ("brand_raw", "family", "model")}
    about = {"machine": platform.machine(), "system": platform.system(), "python_version": platform.python_version()}
    return {**about, "cpu": {**cpu, "count": os.cpu_count()}, "torch": torch.__version__}


# ---- The report ----------------------------------------------------------------------------------------------------


def mean_overlap(record: Record, formula: str, share: float, end: int) -> float:
    """Returns the mean over the data orders that went so far."""
    of_orders = [order[str(share)] for order in record["overlap"][formula]]
    return mean(order[str(end)] for order in of_orders if str(end) in order)


def table(results: Record) -> str:
    """Returns the table and what must be said of it, as Markdown."""
    columns = [(name, formula, share) for name in results["tasks"] for share in SHARES for formula in FORMULAS]
    rows = []
    for end in ends(max(record["batches"] for record in results["tasks"].values()))[:-1]:
        cells = []
        for name, formula, share in columns:
            record = results["tasks"][name]
            known = end < record["batches"]
            cells.append(f"{100 * mean_overlap(record, formula, share, end):.0f}" if known else "")
        rows.append([str(end), *cells])
    for title, key in (("full, another order", "between_orders"), ("full, the other formula", "batch_to_example")):
        cells = []
        for name, formula, share in columns:
            has_no_order = (key, formula) == ("between_orders", "example")
            cells.append("" if has_no_order else f"{100 * mean(results['tasks'][name][key][str(share)]):.0f}")
        rows.append([title, *cells])
    rows.append(["chance", *(f"{100 * share:.0f}" for _, _, share in columns)])
    head = ["batches", *(f"{TASKS[name]}, {share:g}, {FORMULAS[formula]}" for name, formula, share in columns)]
    return f"{markdown(head, rows)}\n\n{about(results)}"


def about(results: Record) -> str:
    """Returns what was measured, as a paragraph."""
    sizes = ", ".join(
        f"{TASKS[name]} {record['examples']} examples in {record['batches']} batches"
        for name, record in results["tasks"].items()
    )
    settings, info = results["settings"], results["machine_info"]
    weights = next(iter(results["tasks"].values()))["weights"] / 1e6
    return (
        f"{settings['model']} with a new head, {weights:.1f} M maskable weights; {sizes} of {settings['batch_size']}, "
        f"at most {settings['max_length']} tokens. Percent of the kept weights, mean of {ORDERS} data orders; of "
        f"examples, one order beyond {LATER_ORDERS_END} batches. {machine_name(SimpleNamespace(machine=info))}, torch "
        f"{info['torch']}, {results['datetime'][:10]}."
    )


def draw(results: Record, path: Path) -> None:
    """Draws a panel for each task: overlap with the full pass by number of batches, the band from lowest to highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fisher_batches"  # the same picture has the same bytes
    figure, axes = pyplot.subplots(1, len(results["tasks"]), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, record) in zip(axes, results["tasks"].items(), strict=True):
        for share, style in zip(SHARES, ("-", "--"), strict=True):
            for formula, colour in COLOURS.items():
                x = ends(record["batches"])
                of_orders = [order[str(share)] for order in record["overlap"][formula]]
                values = [[100 * order[str(end)] for order in of_orders if str(end) in order] for end in x]
                label = f"reserve_p={share:g}, {FORMULAS[formula]}"
                axis.plot(x, list(map(mean, values)), style, color=colour, marker="o", ms=3.5, label=label)
                axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
            axis.axhline(100 * share, color="#7f7f7f", linestyle=style, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ends(record["batches"]), map(str, ends(record["batches"])), fontsize=8)
        axis.set(xlabel=f"batches of {results['settings']['batch_size']}", ylim=(0, 102))
        axis.set_title(f"{TASKS[name]}, {record['batches']} batches", fontsize=11)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("% of the kept weights that a full pass keeps")
    axes[-1].legend(loc="lower right", frameon=False, fontsize=9, title="grey lines: chance")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def report(results: Record) -> None:
    """Writes the table into docs/fisher.md, between its marks, and draws docs/fisher-batches.svg."""
    put_into_page(BEGIN, table(results), END)
    draw(results, DOCS / "fisher-batches.svg")


def put_into_page(begin: str, text: str, end: str) -> None:
    """Writes a text into docs/fisher.md, between two marks; raises ValueError if one is not there."""
    page = DOCS / "fisher.md"
    old = page.read_text(encoding="utf-8")
    start = old.index(begin)
    page.write_text(f"{old[:start]}{begin}\n{text}\n{old[old.index(end, start) :]}", encoding="utf-8")


def main() -> None:
    """Reads the command line, measures if there are data, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="measure, on the tasks in this folder")
    options = parser.parse_args()
    if options.data:
        measure(options.data)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    report(results)
    print(table(results))


if __name__ == "__main__":
    main()
