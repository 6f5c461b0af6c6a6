"""What alpha, and the null beside it, say of matrices that were never trained, and of some that were.

    python -m benchmarks.spectra --measure   # measures, ten minutes of one core, and reports
    python -m benchmarks.spectra             # reports what was measured: the tables of docs/spectra.md

The flag "no sign of training" stands where alpha is above 6 and `rand_spikes` at most 2; the tables say how often it is
wrong, in either direction. Random matrices are made by numpy, so that a seed gives the same one on every machine.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median, quantiles
from types import SimpleNamespace
from typing import Any

import torch

from childtune_fast import __version__
from childtune_fast.spectra.row import FEW_SPIKES, OVER_TRAINED, UNDER_TRAINED, Row

from . import spectra_digits
from .fisher_batches import machine
from .markdown import markdown
from .report import machine_name
from .spectra_matrices import KINDS, PACKAGED_MODEL, Make, Shape, look, matrix, minilm, normal, uniform

RESULTS = Path(__file__).with_name("results") / "spectra.json"
PAGE = Path(__file__).parents[1] / "docs" / "spectra.md"

Record = dict[str, Any]

INITS = {"normal": normal, "uniform": uniform}
UNTRAINED = [  # init, shape, shuffles and matrices
    ("normal", (64, 64), 1, 1000),
    ("normal", (256, 64), 1, 1000),
    ("normal", (256, 256), 1, 600),
    ("normal", (384, 384), 1, 400),
    ("normal", (512, 384), 1, 400),
    ("normal", (1536, 384), 1, 300),
    ("normal", (768, 768), 1, 300),
    ("normal", (3072, 768), 1, 150),
    ("normal", (30522, 384), 1, 60),
    ("uniform", (64, 64), 1, 1000),
    ("uniform", (384, 384), 1, 400),
    ("uniform", (1536, 384), 1, 300),
    ("uniform", (64, 64, 3, 3), 1, 1000),
    ("uniform", (256, 256, 3, 3), 1, 100),
    ("normal", (256, 256), 5, 300),
    ("uniform", (64, 64, 3, 3), 5, 300),
]
SHAPES = {(384, 384): 100, (1536, 384): 50}  # of the other kinds, and the number of matrices of each


# ---- The measurement -----------------------------------------------------------------------------------------------


def found_in(make: Make, shape: Shape, matrices: int, null: int = 1) -> Record:
    """Returns what is found in matrices of the seeds from 0 on."""
    return record_of(look(matrix(make, shape, seed), seed, null) for seed in range(matrices))


def record_of(rows: Iterable[Row]) -> Record:
    """Returns alpha, None where there is no fit, and rand_spikes of some rows."""
    rows = list(rows)
    alpha = [None if math.isnan(row.alpha) else round(row.alpha, 4) for row in rows]
    return {"alpha": alpha, "rand_spikes": [row.rand_spikes for row in rows]}


def measure() -> None:
    """Measures everything, and writes the results."""
    torch.set_num_threads(1)
    begin = time.process_time()
    untrained = []
    for init, shape, null, matrices in UNTRAINED:
        found = found_in(INITS[init], shape, matrices, null)
        untrained.append({"init": init, "shape": shape, "null": null, **found})
        print(f"{init}, {shape}, {null}: {time.process_time() - begin:.0f} s so far", flush=True)
    model = {"trained": record_of(minilm(None)), "shuffled": record_of(minilm(0))}
    kinds = []
    for kind in KINDS:
        for shape, matrices in SHAPES.items():
            found = found_in(kind.make, shape, matrices)
            kinds.append({"title": kind.title, "learned": kind.learned, "shape": shape, **found})
        print(f"{kind.title}: {time.process_time() - begin:.0f} s so far", flush=True)
    learned = spectra_digits.measure()
    about = {
        "machine_info": machine(),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "childtune_fast": __version__,
        "cpu_seconds": round(time.process_time() - begin),
    }
    keep({**about, "untrained": untrained, PACKAGED_MODEL: model, "kinds": kinds, "digits": learned})


def keep(results: Record) -> None:
    """Writes the results, a line for each record of a list."""
    parts = []
    for name, value in results.items():
        lines = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else None
        parts.append(f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# ---- The report ----------------------------------------------------------------------------------------------------


def flags(record: Record) -> list[bool]:
    """Returns which rows have the flag."""
    pairs = zip(record["alpha"], record["rand_spikes"], strict=True)
    return [alpha is not None and alpha > UNDER_TRAINED and spikes <= FEW_SPIKES for alpha, spikes in pairs]


def percent(which: Iterable[bool]) -> str:
    """Returns a share in percent, as text; "<1" and ">99" of what is not quite none or all."""
    share = 100 * mean(which)
    if 0 < share < 1 or 99 < share < 100:
        return "<1" if share < 1 else ">99"
    return f"{share:.0f}"


def size(shape: Shape) -> str:
    """Returns a shape as text."""
    return " x ".join(map(str, shape))


def untrained_table(results: Record) -> str:
    """Returns the table of matrices as they are initialized, with a real model below."""
    rows = []
    for record in results["untrained"]:
        title = f"{record['init']}, {size(record['shape'])}" + (f", null={record['null']}" * (record["null"] > 1))
        rows.append(_row(title, record))
    for title, which in (("", "trained"), (", in random order", "shuffled")):
        rows.append(_row(f"{PACKAGED_MODEL}{title}", results[PACKAGED_MODEL][which]))
    head = ["", "layers", "alpha 2 to 6, %", "above 6, %", "median", "rand_spikes, median", "most"]
    head += [f"above {FEW_SPIKES}, %", "flagged, %"]
    return f"{markdown(head, rows)}\n\n{about(results)}"


def _row(title: str, record: Record) -> list[str]:
    alpha, spikes = record["alpha"], record["rand_spikes"]
    return [
        title,
        str(len(alpha)),
        percent(OVER_TRAINED <= value <= UNDER_TRAINED for value in alpha),
        percent(value > UNDER_TRAINED for value in alpha),
        f"{median(alpha):.1f}",
        f"{median(spikes):g}",
        str(max(spikes)),
        percent(count > FEW_SPIKES for count in spikes),
        percent(flags(record)),
    ]


def about(results: Record) -> str:
    """Returns where it was measured, as a paragraph."""
    info = results["machine_info"]
    name = machine_name(SimpleNamespace(machine=info))
    return f"In float64, null=1 where nothing else is said. {name}, torch {info['torch']}, {results['datetime'][:10]}."


def wrong_table(results: Record) -> str:
    """Returns the table of kinds of matrices, with how often the flag is wrong."""
    rows = []
    for kind in KINDS:
        row = [kind.title, "yes" if kind.learned else "no"]
        for shape in SHAPES:
            (record,) = (r for r in results["kinds"] if r["title"] == kind.title and tuple(r["shape"]) == shape)
            wrong = percent(flag == kind.learned for flag in flags(record))
            row += [spread(record["alpha"], ".1f"), spread(record["rand_spikes"], ".0f"), wrong]
        rows.append(row)
    head = ["", "planted"]
    for shape, matrices in SHAPES.items():
        head += [f"{size(shape)} ({matrices}): alpha", "rand_spikes", "wrong, %"]
    return markdown(head, rows)


def spread(values: list[float | None], form: str) -> str:
    """Returns the first and last decile of some values; "no fit" if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "no fit"
    deciles = quantiles(known, n=10, method="inclusive")
    return " to ".join(dict.fromkeys(format(value, form) for value in (deciles[0], deciles[-1])))


def digits_table(results: Record) -> str:
    """Returns the table of networks that learned digits."""
    rows = []
    for setting in results["digits"]:
        for name, shape in spectra_digits.LAYERS.items():
            of_layer = [found[name] for found in setting["found"]]
            after = {key: [layer[key][1] for layer in of_layer] for key in ("alpha", "rand_spikes")}
            before = median(layer["alpha"][0] for layer in of_layer)
            rows.append([
                f"{setting['classes']} classes, lr {setting['lr']:g}, {setting['epochs']} epochs: {shape}",
                f"{100 * mean(found['accuracy'] for found in setting['found']):.0f}",
                f"{100 * mean(layer['accuracy_without'] for layer in of_layer):.0f}",
                f"{before:.1f}",
                f"{median(after['alpha']):.1f}",
                " to ".join(dict.fromkeys(f"{count(after['rand_spikes'])}" for count in (min, max))),
                f"{sum(flags(after))} of {len(of_layer)}",
            ])  # fmt: skip
    head = ["", "accuracy, %", "with this layer put back", "alpha before", "after", "rand_spikes after", "flagged"]
    return markdown(head, rows)


TABLES: dict[str, Callable[[Record], str]] = {
    "untrained": untrained_table,
    "wrong": wrong_table,
    "digits": digits_table,
}


def marks(name: str) -> tuple[str, str]:
    """Returns what stands before and after a table in the page."""
    return tuple(f"<!-- python -m benchmarks.spectra, {name}: {which} -->" for which in ("begin", "end"))


def report(results: Record, page: Path = PAGE) -> None:
    """Writes the tables into the page, each between its marks."""
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = marks(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(results)}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Reads the command line, measures if told to, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure anew")
    if parser.parse_args().measure:
        measure()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    report(results)
    print("\n\n".join(table(results) for table in TABLES.values()))


if __name__ == "__main__":
    main()
