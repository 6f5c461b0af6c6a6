"""Fine-tuning, compared: `python -m benchmarks.finetune run`, then `report`. README.md says what is compared."""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

from .data import load_dev, load_task
from .methods import DEFAULT, METHODS, Settings
from .model import POOLINGS
from .options import positive
from .sources import UserError

DEFAULTS = Settings(lr=2e-4, head_lr=5e-2, epochs=3, max_length=64)
TASKS = ["glue/stsb", "glue/mrpc", "docstrings"]
NAMED = ("lr", "head_lr", "reserve_p", "reserve_p_d", "epochs", "batch_size", "max_length")
NAMED += ("head_epochs", "evaluations_per_epoch")


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="searches learning rates and runs all seeds; continues where it stopped")
    report = commands.add_parser("report", help="writes tables and pictures of the runs that are there")
    for command in (run, report):
        command.add_argument(
            "--out", type=Path, default=Path("finetune-results"), help="folder of the results (default: %(default)s)"
        )
    add = run.add_argument
    add("--tasks", nargs="+", default=TASKS, help=f"see README.md (default: {' '.join(TASKS)})")
    add("--data", type=Path, help="folder of the tasks named as NAME: NAME/train.tsv.gz and NAME/dev.tsv.gz")
    add("--model", help="name or folder of a transformers model (default: all-MiniLM-L6-v2, from its package)")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    add("--limit", type=positive(int), help="training examples at most (default: all)")
    add("--seeds", type=positive(int), default=5, help="of the report (default: %(default)s)")
    add("--tuning-seeds", type=positive(int), default=1, help="of the search of learning rates (default: %(default)s)")
    for name in NAMED:
        value = getattr(DEFAULTS, name)
        kind = positive(type(value), or_zero=value == 0)
        add(f"--{name.replace('_', '-')}", type=kind, default=value, help="default: %(default)s")
    add("--pooling", choices=POOLINGS, default=DEFAULTS.pooling, help="one vector of all tokens (default: %(default)s)")
    add("--domains", nargs="+", default=[], help="score the report's models on these tasks too")
    add("--heads-on", nargs="+", default=[], help="train heads for these tasks on the report's encoders, frozen")
    add("--jobs", type=positive(int), default=1, help="processes side by side (default: %(default)s)")
    add("--devices", nargs="+", default=["cpu"], help="torch devices, shared out among them (default: cpu)")
    add("--budget-minutes", type=float, default=math.inf, help="begin no run after that long (default: no limit)")
    return parser.parse_args(arguments)


def run(options):
    """Runs what is missing; returns the exit status: 0 if nothing is missing any more."""
    from multiprocessing import get_context

    from tqdm import tqdm

    from . import runs, sweep, transfer
    from .model import PACKAGED_MODEL
    from .worker import Worker, begin_process

    named = {name: getattr(options, name) for name in (*NAMED, "pooling")}
    settings = dataclasses.replace(DEFAULTS, **named)
    identity = settings.identity()
    name = Path(options.model).name if options.model else PACKAGED_MODEL
    names = dict.fromkeys([*options.tasks, *options.heads_on])  # what is wrong with them is said before anything runs
    tasks = {one: load_task(one, limit=options.limit, folder=options.data, set_aside=True) for one in names}
    if options.domains:
        others = [load_dev(one, options.data) for one in options.domains]
        transfer.check_domains([*(tasks[one] for one in options.tasks), *others])
    elsewhere = [(one, list(getattr(options, one))) for one in ("domains", "heads_on") if getattr(options, one)]
    identity += tuple((one, " ".join(given)) for one, given in elsewhere)
    specs = [runs.Spec(task, "", 0.0, 0, "", name, options.limit, identity) for task in options.tasks]
    plan = sweep.Plan(specs, options.methods, settings, options.seeds, options.tuning_seeds)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    folder = options.out / "runs"
    worker = Worker(
        settings,
        options.model,
        options.data,
        folder,
        tuple(options.devices),
        threads,
        tuple(options.domains),
        tuple(options.heads_on),
    )
    done = sweep.finished(folder, plan)
    for one in options.tasks:
        found = {record["data"]["fingerprint"] for record in done if record["spec"]["task"] == one}
        if found - {tasks[one].fingerprint()}:
            raise UserError(f"{folder}: {one} had other data when its runs began; give another --out")
    shared = get_context("spawn").Value("d", 0.0)
    every = 1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    form = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"
    total = sweep.to_come(folder, plan)
    print(f"{total} runs to come; first, each process loads the model", flush=True)
    with tqdm(total=total, smoothing=0, miniters=0, mininterval=every, bar_format=form, dynamic_ncols=True) as bar:
        lines = []
        told = []

        def show(line):
            lines.append(line)
            bar.write(line)
            bar.total = len(lines) + sweep.to_come(folder, plan)  # a search that goes on adds one

        def watch(under_way):
            bar.set_postfix_str("; ".join(f"{s.task} {s.method} seed {s.seed}" for s in under_way), refresh=False)
            bar.update(shared.value - bar.n)
            if under_way != told:  # at once, though no step is done yet
                told[:] = under_way
                bar.refresh()

        begin = begin_process, (shared,)
        try:
            complete = sweep.sweep(folder, plan, worker, options.jobs, options.budget_minutes, show, watch, begin)
        except KeyboardInterrupt:
            bar.write("interrupted; the same command continues")
            return 130
        bar.update(len(lines) - bar.n)
    print("all runs are there" if complete else "time is up; the same command continues")
    return 0 if complete else 3


def report(options):
    """Writes tables and pictures; returns the exit status."""
    from . import compare, pictures, runs

    records = runs.read_all(options.out / "runs")
    if not records:
        raise UserError(f"{options.out}/runs: no finished runs; begin with `python -m benchmarks.finetune run`")
    text = compare.tables(records)
    (options.out / "report.md").write_text(text + "\n", encoding="utf-8")
    pictures.pictures(records, options.out)
    print(text)
    return 0


def main(arguments):
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    try:
        return {"run": run, "report": report}[options.command](options)
    except UserError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
