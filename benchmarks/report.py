"""Makes tables and a picture of a result: `python -m benchmarks.report RESULT.json`.

Prints the tables and keeps them, the picture and the numbers behind them in benchmarks/results/ (or in --out FOLDER),
named after the CPU.
"""

import argparse
import contextlib
import json
import re
from pathlib import Path

from .contestants import TITLES
from .promises import PROMISES, QUIET, Results

WORKLOAD_TITLES = {
    "bert-base": "BERT-base, 109 M weights in 199 tensors: ns per weight",
    "1000x33": "1000 tensors of 33 weights: us per tensor",
}
FISHER_TITLES = {"ours": "one fused pass", "addcmul": "F.addcmul_(g, g)", "add_product": "F.add_(g * g)"}


def main() -> None:
    """Reads the command line and writes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what `pytest benchmarks --benchmark-json=RESULT.json` wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args()
    data = json.loads(options.result.read_text(encoding="utf-8"))
    results = Results(data)
    base = options.out / slug(results)
    options.out.mkdir(parents=True, exist_ok=True)
    text = report(results)
    picture = draw(results, base)
    if picture:
        text += f"\n![nanoseconds per weight by optimizer]({picture.name})\n"
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(text)
    print(f"kept as {base}.md, .json" + (", .png" if picture else ""))


def slug(results: Results) -> str:
    """Returns the CPU's name for a file name, such as "amd-epyc-family-25-model-1-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name(results).lower()).strip("-")


def machine_name(results: Results) -> str:
    """Returns what a reader calls the machine; a brand alone says little where it names a whole line of products."""
    cpu = results.machine["cpu"]
    brand = cpu.get("brand_raw") or results.machine["machine"]
    if not re.search(r"\d", brand):
        brand += f", family {cpu.get('family')}, model {cpu.get('model')}"
    return f"{brand}, {cpu['count']} cores"


def report(results: Results) -> str:
    """Returns everything but the picture, as Markdown."""
    native = results.machine["native"]
    parts = [
        "# Benchmark results",
        f"{machine_name(results)}; {results.machine['system']}, Python {results.machine['python_version']}, "
        f"torch {results.machine['torch']}, {native['compiler']}, {native['instruction_set']}; {results.date}, "
        f"commit {results.commit['id'][:10]}{' with changes' if results.commit['dirty'] else ''}.",
        "Times are medians. A ratio is the median of the ratios within rounds in which both were timed, with its "
        "quartiles in brackets. How it is measured, and how to do it again: benchmarks/README.md.",
        quietness(results),
        "## What is promised",
        promises_table(results),
    ]
    for workload, title in WORKLOAD_TITLES.items():
        table = times_table(results, workload)
        if table:
            parts += [f"## {title}", table]
    return "\n\n".join([*parts, *filter(None, (fisher_table(results), memory_table(results)))]) + "\n"


def quietness(results: Results) -> str:
    """Returns whether other processes disturbed the measurement, in a sentence."""
    counts = results.interruptions()
    if not counts:
        return "Whether other processes disturbed the measurement was not recorded."
    judged = "so the machine was quiet" if max(counts) < QUIET else "so it was NOT QUIET: measure again"
    return f"Other processes took a core from the benchmark at most {max(counts):.0f} times a second, {judged}."


def promises_table(results: Results) -> str:
    """Returns the promises, measured and judged."""
    rows = []
    for promise in PROMISES:
        try:
            found = promise.read(results)
        except KeyError:
            rows.append([promise.text, "not measured", promise.show(promise.at_most), ""])
            continue
        spread = found if isinstance(found, dict) else {"median": found}
        measured = promise.show(spread["median"])
        if "q1" in spread:
            low, high = sorted((spread["q1"], spread["q3"]))
            measured += f" [{promise.show(low)}, {promise.show(high)}]"
        verdict = "met" if spread["median"] <= promise.at_most else "**missed**"
        if spread.get("disturbed"):
            verdict = "disturbed"
        rows.append([promise.text, measured, promise.show(promise.at_most), verdict])
    return markdown(["", "measured", "at most", ""], rows)


def times_table(results: Results, workload: str) -> str:
    """Returns the times of all contestants on a workload, and F's ratios to them; empty if nothing was measured."""
    columns = results.steps(workload)
    if not columns:
        return ""
    rows = []
    for name, title in TITLES.items():
        row = [title]
        for step in columns.values():
            row += [f"{time_per_unit(step, workload, name):.3g}", ratio_to(step, name)]
        rows.append(row)
    head = [""]
    for column in columns:
        head += [column, "F to it"]
    return markdown(head, rows)


def time_per_unit(step: dict, workload: str, name: str) -> float:
    """Returns a contestant's median time: ns per weight, or us per tensor on the tiny tensors."""
    nanoseconds = step["times_ns"][name]["median"]
    return nanoseconds / step["weights"] if workload == "bert-base" else nanoseconds / 1e3 / step["tensors"]


def ratio_to(step: dict, name: str) -> str:
    """Returns the ratio of F's time to that of `name`."""
    ratio = step["ratios"]["ours"].get(name)
    return f"{ratio['median']:.2g}" if ratio else ""


def fisher_table(results: Results) -> str:
    """Returns the times to accumulate squared gradients; empty if they were not measured."""
    measured = {}
    for threads in (2, 1):
        with contextlib.suppress(KeyError):
            measured[f"{threads} thread{'s' * (threads > 1)}"] = results.fisher(threads)
    if not measured:
        return ""
    rows = [
        [title, *(f"{noted['times_ns'][name]['median'] / noted['weights']:.3g}" for noted in measured.values())]
        for name, title in FISHER_TITLES.items()
    ]
    return "## Fisher accumulation, 84 M weights, fp32: ns per weight\n\n" + markdown(["", *measured], rows)


def memory_table(results: Results) -> str:
    """Returns what a step allocates; empty if it was not measured."""
    try:
        cost = results.cost("memory_of_a_step")
    except KeyError:
        return ""
    rows = []
    for name, found in cost["allocated"].items():
        resident = found["resident_bytes"]
        rows.append([
            TITLES[name],
            f"{found['torch_bytes'] / cost['weights']:.2f}",
            "unknown" if resident is None else f"{resident / 1e6:.1f}",
            f"{found['python_bytes'] / cost['tensors']:.0f}",
        ])  # fmt: skip
    head = ["", "bytes allocated by torch, per weight", "growth of resident memory, MB", "Python's heap, per tensor"]
    return "## Memory of one step after the first, fp32, BERT-base\n\n" + markdown(head, rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rules = ["-" * width for width in widths]
    lines = (zip(row, widths, strict=True) for row in [head, rules, *rows])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in line) + " |" for line in lines)


def draw(results: Results, base: Path) -> Path | None:
    """Draws the picture; returns its path, or None if what it shows was not measured."""
    from . import picture

    return picture.draw(results, machine_name(results), base.with_suffix(".png"))


if __name__ == "__main__":
    main()
