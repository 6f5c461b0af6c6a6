"""Measures on a GPU: `python -m benchmarks.gpu`. Writes samples and tables to benchmarks/results/, by the GPU's name.

It measures the step of F and of D, scores and the choice among them (gpu_scores.py), and fine-tuning as a whole
(training.py). Contestants alternate in rounds, in an order that changes. Each step is timed by two events on the GPU,
and by the clock until the call returns. Ratios are taken within rounds. Nothing fits in a GPU's cache, so every step
reads and writes memory. "of copy" is a step's bytes per second divided by those of copying a gigabyte, where bytes read
and bytes written both count.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path

import torch

from childtune_fast import __version__

from . import gpu_scores, training
from .contestants import CHILD_TITLES, TITLES, make_child_contestants, make_gpu_contestants
from .gpu_race import Clock, race
from .markdown import markdown
from .race import spread
from .workloads import DTYPES, GPU_WORKLOADS, make_workload

# Bytes per weight that a step of ChildAdamW moves: it reads p, g, m and v and writes p, m and v, of which m and v are
# float32.
BYTES = {"float32": 28, "bfloat16": 22}
# Bytes per weight that a step of D moves if all weights are maskable: it reads p, g and the mask's bits and writes p.
# For the share `p` of weights in the child network it also reads and writes m and v.
CHILD_BYTES = {"float32": lambda p: 12 + 1 / 8 + 16 * p, "bfloat16": lambda p: 6 + 1 / 8 + 16 * p}
D = "bert-large, child network"
RATIOS = (  # promised ratios: title, workload and dtype, contestant, contestant it is compared with, upper bound
    ("F, float32, to torch fused", ("bert-large", "float32"), "ours", "fused", 1.0),
    ("F, float32, to the naive published step", ("bert-large", "float32"), "ours", "naive", 1 / 8),
    ("D, p = 0.3, float32, to torch fused", (D, "float32"), "ours", "fused", 0.65),
    ("D, p = 0.1, float32, to torch fused", (D, "float32"), "ours_p0.1", "fused", 0.55),
)
SHARES = (  # promised shares of the rate of copying: title, workload and dtype, contestant, lower bound
    ("F, float32, share of copy bandwidth", ("bert-large", "float32"), "ours", 0.90),
    ("F, bfloat16, share of copy bandwidth", ("bert-large", "bfloat16"), "ours", 0.88),
)


def copy_rate(clock: Clock, device: str, size: int) -> float:
    """Returns the bytes read and written per second when `size` bytes are copied on the device, median of 20 copies."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = [clock.time(lambda: target.copy_(source))[0] for _ in range(23)][3:]
    return 2 * size / (1e-3 * spread(times)["median"])


def table(noted: dict, rate: float) -> str:
    """Returns the table of one workload, as Markdown; `rate` is that of copying, in bytes per second."""
    rows = []
    titles = CHILD_TITLES if noted["child"] else TITLES
    for name, samples in noted["samples_ms"].items():
        device, host = ([sample[i] for sample in samples if sample] for i in (0, 1))
        ratio = ratio_within_rounds(noted["samples_ms"], "ours", name)
        of_copy = f"{share_of_copy(noted, name, rate):.2f}" if name in noted["bytes"] else ""
        rows.append(
            [
                titles[name],
                f"{spread(device)['median']:.3g}",
                f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}]",
                of_copy,
                f"{spread(host)['median']:.3g}",
            ]
        )
    head = ["", "ms", "D to it" if noted["child"] else "F to it", "of copy", "host ms"]
    title = f"## {noted['workload']}, {noted['weights'] / 1e6:.0f} M weights in {noted['tensors']} tensors, "
    return f"{title}{noted['dtype']}\n\n{markdown(head, rows)}"


def measure(clock: Clock, device: str, rounds: int, scale: int) -> dict:
    """Returns the record that is written as JSON: the machine, its rate of copying, and all samples."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name(device) if clock.on_gpu else "CPU"
    data = {
        "machine": {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda},
        "version": __version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "copy_bytes_per_s": copy_rate(clock, device, (1 << 30) // scale),
        "measured": [],
    }
    for (workload, shapes), dtype, child in itertools.product(GPU_WORKLOADS.items(), BYTES, (False, True)):
        scaled = [tuple(max(1, size // scale) for size in shape) for shape in shapes]
        work = make_workload(scaled, DTYPES[dtype], device)
        noted = {"workload": workload + ", child network" * child, "dtype": dtype, "child": child}
        noted |= {"weights": work.weights, "tensors": len(work.params)}
        whole = BYTES[dtype] * work.weights
        noted["bytes"] = {"ours": whole, "ours_p1": whole}
        if child:
            of_child = {"ours": CHILD_BYTES[dtype](0.3), "ours_p0.1": CHILD_BYTES[dtype](0.1)}
            noted["bytes"] |= {name: moved * work.weights for name, moved in of_child.items()}
        make = make_child_contestants if child else make_gpu_contestants
        noted["samples_ms"] = race(make(work), clock, rounds)
        data["measured"].append(noted)
        del work  # frees its memory before the next workload is made
    data["scores"] = gpu_scores.measure(clock, device, rounds, scale)
    data["training"] = training.measure(clock, device, rounds, scale)
    return data


def ratio_within_rounds(samples: dict, name: str, other: str) -> dict[str, float]:
    """Returns the spread of the ratio of two contestants' times, over the rounds that both took part in."""
    pairs = zip(samples[name], samples[other], strict=True)
    return spread([a[0] / b[0] for a, b in pairs if a and b])


def share_of_copy(noted: dict, name: str, rate: float) -> float:
    """Returns a contestant's bytes per second, divided by `rate`, those of copying."""
    milliseconds = spread([sample[0] for sample in noted["samples_ms"][name] if sample])["median"]
    return noted["bytes"][name] / (1e-3 * milliseconds) / rate


def targets(data: dict) -> str:
    """Returns the table of promises on a GPU, as Markdown."""
    measured = {(noted["workload"], noted["dtype"]): noted for noted in data["measured"]}
    rate, rows = data["copy_bytes_per_s"], []
    for title, where, name, other, most in RATIOS:
        found = ratio_within_rounds(measured[where]["samples_ms"], name, other)["median"]
        rows.append([title, f"{found:.3f}", f"at most {most:.3f}", "met" if found <= most else "missed"])
    for title, where, name, least in SHARES:
        found = share_of_copy(measured[where], name, rate)
        rows.append([title, f"{found:.2f}", f"at least {least:.2f}", "met" if found >= least else "missed"])
    for title, found, bound, met in gpu_scores.targets(data["scores"], rate):
        rows.append([title, found, bound, "met" if met else "missed"])
    return "## What it must reach\n\n" + markdown(["", "measured", "promised", ""], rows)


def report(data: dict) -> str:
    """Returns the report with all tables, as Markdown."""
    machine, rate = data["machine"], data["copy_bytes_per_s"]
    about = (
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}; {data['date']}, commit {data['commit']}. "
        f"Copying moves {rate / 1e12:.2f} TB/s. Medians of {data['rounds']} rounds, quartiles in brackets; how it is "
        "measured: benchmarks/gpu.py."
    )
    steps = (table(noted, rate) for noted in data["measured"])
    rest = gpu_scores.table(data["scores"], rate), training.table(data["training"])
    return "\n\n".join(["# Benchmark results on a GPU", about, targets(data), *steps, *rest])


def main() -> None:
    """Reads the command line, measures, and writes report and samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only shows whether this program works (default: cuda)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes, to try this out (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args()
    os.environ["CHILDTUNE_BACKEND"] = "native"  # for functions that have no `backend` argument
    data = measure(Clock(options.device), options.device, options.rounds, options.scale)
    text = report(data)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / re.sub(r"[^a-z0-9]+", "-", data["machine"]["gpu"].lower()).strip("-")
    base.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
