"""The machines side by side, from the files in results/: `python -m benchmarks.machines` prints machines.md's table."""

import json
from pathlib import Path

from .markdown import markdown
from .promises import PROMISES, Promise, promised, verdict
from .readings import Ratio, Results
from .report import machine_name

NOT_MEASURED = "not measured"
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Prints the table."""
    print(table([Results(json.loads(path.read_text(encoding="utf-8"))) for path in files()]))


def files() -> list[Path]:
    """Returns the results of `make bench`, by machine; other programs' results have no report beside them."""
    return sorted(path for path in RESULTS.glob("*.json") if path.with_suffix(".md").exists())


def table(machines: list[Results]) -> str:
    """Returns a column for each machine with its ratios, as Markdown; a row for each that any machine has."""
    columns = [cells(results) for results in machines]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, bounds(name), *(column.get(name, "-") for column in columns)] for name in names]
    head = [f"{machine_name(results)}, {results.instruction_sets[-1]}, {results.date}" for results in machines]
    return markdown(["", "at most", *head], [row for row in rows if any(cell[0].isdigit() for cell in row[2:])])


def bounds(name: str) -> str:
    """Returns the bounds of what is promised, also those for narrower instruction sets; "" in the rows of these."""
    promises = [promise for promise in PROMISES if promise.name == name]
    if not promises:
        return ""
    bounds = [" / ".join(promise.show(promise.at_most) for promise in promises)]
    for narrower in promises[0].narrower:
        shown = (promise.show(promise.narrower[narrower]) for promise in promises)
        bounds.append(f"{narrower} {' / '.join(shown)}")
    return "; ".join(bounds)


def cells(results: Results) -> dict[str, str]:
    """Returns {what is promised: the ratio, or those with 2 threads and with 1}."""
    found: dict[str, list[str]] = {}
    for promise in promised(results):
        if isinstance(promise.read, Ratio):
            found.setdefault(promise.name, []).append(cell(promise, results))
    return {name: " / ".join(parts) if set(parts) != {NOT_MEASURED} else NOT_MEASURED for name, parts in found.items()}


def cell(promise: Promise, results: Results) -> str:
    """Returns a ratio with its verdict, unless it was met."""
    try:
        ratio = promise.read(results)
    except KeyError:
        return NOT_MEASURED
    judged = verdict(promise, ratio)
    return promise.show(ratio["median"]) + {"met": "", "**missed**": " (missed)"}.get(judged, f" ({judged})")


if __name__ == "__main__":
    main()
