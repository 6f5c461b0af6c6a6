"""How far the child network of few batches is from that of a full pass, by reserve_p, where dev scores are known too.

    python -m benchmarks.fisher_shares --data FOLDER   # measures, five minutes of one core, and reports
    python -m benchmarks.fisher_shares                 # reports what was measured: a table in docs/fisher.md

These are the child networks of benchmarks/finetune's runs of `d`, `d-p0.1`, `d-4-batches` and so on: 1000 examples of
STS-B, and heads and orders of data by the same seeds. FOLDER is as in benchmarks/fisher_batches.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

from childtune_fast import ChildNetwork

from .finetune import methods, model, train
from .fisher_batches import SETTINGS, Record, Task, children, ends, machine, overlaps, put_into_page
from .markdown import markdown
from .report import machine_name

RESULTS = Path(__file__).with_name("results") / "fisher_shares.json"
BEGIN, END = "<!-- python -m benchmarks.fisher_shares: begin -->", "<!-- python -m benchmarks.fisher_shares: end -->"
TASK, EXAMPLES, SEEDS = "glue/stsb", 1000, 5
SHARES = tuple(sorted((*methods.SHARES, SETTINGS.reserve_p_d)))
SCORED = (1, 4, 16)  # numbers of batches, besides all, with which there are runs, at the sweep's own reserve_p


def measure(folder: Path) -> None:
    """Measures the overlaps with the full pass, and writes them, with the counts of the child networks of runs."""
    tokenizer, backbone = model.load_pretrained(model.packaged_model())
    results: Record = {
        "machine_info": machine(),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "overlap": [],
        "counts": [],
    }
    for seed in range(SEEDS):
        task = Task(TASK, folder, tokenizer, backbone, EXAMPLES, seed)
        order = list(train.batches(task.experiment.tokens["train"].lengths, SETTINGS, seed))
        found = dict(children(task.net, order, task.batch_of, task.loss, "batch", shares=SHARES))
        results["overlap"].append(overlaps(found, found[len(order)]))
        of_runs = {str(end): counts(found[end][SETTINGS.reserve_p_d]) for end in (*SCORED, len(order))}
        results["counts"].append(of_runs)
        results["batches"], results["fingerprint"] = len(order), task.task.fingerprint()
        print(f"seed {seed} of {SEEDS}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def counts(child: ChildNetwork) -> str:
    """Returns how many weights a child network has in each tensor, in the model's order."""
    return " ".join(str(tensor.count) for tensor in child.summary().tensors)


def table(results: Record) -> str:
    """Returns the table and what must be said of it, as Markdown."""
    of_seeds, info = results["overlap"], results["machine_info"]
    rows = [
        [str(end), *(f"{100 * mean(of_seed[str(p)][str(end)] for of_seed in of_seeds):.0f}" for p in SHARES)]
        for end in ends(results["batches"])[:-1]
    ]
    rows.append(["chance", *(f"{100 * p:.0f}" for p in SHARES)])
    about = (
        f"STS-B, {EXAMPLES} examples in {results['batches']} batches of {SETTINGS.batch_size}, scores of batches. "
        f"Percent of the weights that the full pass keeps at that p, mean of {len(of_seeds)} seeds. "
        f"{machine_name(SimpleNamespace(machine=info))}, torch {info['torch']}, {results['datetime'][:10]}."
    )
    return f"{markdown(['batches', *(f'p = {p:g}' for p in SHARES)], rows)}\n\n{about}"


def main() -> None:
    """Reads the command line, measures if there are data, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="measure, on the task in this folder")
    options = parser.parse_args()
    if options.data:
        measure(options.data)
    text = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    put_into_page(BEGIN, text, END)
    print(text)


if __name__ == "__main__":
    main()
