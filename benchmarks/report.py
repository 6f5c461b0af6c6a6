"""Makes tables and a picture of a result: `python -m benchmarks.report RESULT.json`.

Prints the tables, and writes the tables, the picture and the raw numbers to benchmarks/results/ (or to --out FOLDER),
in files that are named after the CPU.
"""

import argparse
import json
import re
from pathlib import Path

from . import tables
from .markdown import markdown
from .promises import promised, verdict
from .readings import QUIET, Results


def main() -> None:
    """Reads the command line, and writes tables, picture and numbers."""
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
    """Returns the CPU's brand and number of cores; adds family and model to a brand without a number."""
    cpu = results.machine["cpu"]
    brand = cpu.get("brand_raw") or results.machine["machine"]
    if not re.search(r"\d", brand):
        brand += f", family {cpu.get('family')}, model {cpu.get('model')}"
    return f"{brand}, {cpu['count']} cores"


def report(results: Results) -> str:
    """Returns the whole report except the picture, as Markdown."""
    native = results.machine["native"]
    parts = [
        "# Benchmark results",
        f"{machine_name(results)}; {results.machine['system']}, Python {results.machine['python_version']}, "
        f"torch {results.machine['torch']}, {native['compiler']}, {native['instruction_set']} "
        f"(of {', '.join(results.instruction_sets)}); {results.date}, "
        f"commit {results.commit['id'][:10]}{' with changes' if results.commit['dirty'] else ''}.",
        "Times are medians. A ratio is the median of the ratios within rounds in which both were timed, with its "
        "quartiles in brackets. How it is measured, and how to do it again: benchmarks/README.md.",
        quietness(results),
        "## What is promised",
        "A step's ratio is to torch's fused AdamW, on BERT-base (D and 8-bit state: on 84 M weights), unless another "
        "is named. A bound that is missed is called at the roof where moving the step's bytes alone takes as long, "
        "within 3 %: this machine's memory forbids it.",
        promises_table(results),
    ]
    return "\n\n".join([*parts, *tables.measured(results)]) + "\n"


def quietness(results: Results) -> str:
    """Returns a sentence that says whether other processes disturbed the measurement."""
    counts = results.interruptions()
    if not counts:
        return "Whether other processes disturbed the measurement was not recorded."
    judged = "so the machine was quiet" if max(counts) < QUIET else "so it was NOT QUIET: measure again"
    return f"Other processes took a core from the benchmark at most {max(counts):.0f} times a second, {judged}."


def promises_table(results: Results) -> str:
    """Returns the table of promises with measured values and verdicts, as Markdown."""
    rows = []
    for promise in promised(results):
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
        rows.append([promise.text, measured, promise.show(promise.at_most), verdict(promise, spread)])
    return markdown(["", "measured", "at most", ""], rows)


def draw(results: Results, base: Path) -> Path | None:
    """Draws the picture; returns its path, or None if what it shows was not measured."""
    from . import picture

    return picture.draw(results, machine_name(results), base.with_suffix(".png"))


if __name__ == "__main__":
    main()
