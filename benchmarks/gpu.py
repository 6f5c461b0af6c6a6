"""Measures a step on a GPU: `python -m benchmarks.gpu`. Keeps samples and tables in benchmarks/results/, by its name.

Contestants alternate in rounds, in an order that changes; each step is timed by two events on the GPU, and by the clock
until the call returns. Ratios are taken within rounds. Nothing fits in a GPU's cache, so every step reads and writes
memory: "of copy" is the rate of its bytes to that of copying a gigabyte, bytes read and written counted alike.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import time
from pathlib import Path

import torch

from childtune_fast import __version__

from .contestants import TITLES, Contestant, make_gpu_contestants
from .markdown import markdown
from .race import spread
from .workloads import DTYPES, GPU_WORKLOADS, make_workload

WARMUP_ROUNDS = 3
# Moved per weight by ours, whose state is float32: p, g, m and v are read, p, m and v written.
BYTES = {"float32": 28, "bfloat16": 22}


class Clock:
    """Times a call: milliseconds on the device, and until it returned. On a CPU, to try this out, both are one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def time(self, call) -> tuple[float, float]:
        """Returns both."""
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        if not self.on_gpu:
            return host, host
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host


def race(contestants: dict[str, Contestant], clock: Clock, rounds: int) -> dict[str, list[tuple[float, float] | None]]:
    """Returns {name: its times in each round; None where it took no part}."""
    order, shuffle = list(contestants), random.Random(0).shuffle
    samples = {name: [] for name in contestants}
    for number in range(-WARMUP_ROUNDS, rounds):
        shuffle(order)
        for name in order:
            contestant = contestants[name]
            if number > 0 and number % contestant.every:
                samples[name].append(None)
                continue
            if contestant.before is not None:
                contestant.before()
            measured = clock.time(contestant.step)
            if number >= 0:
                samples[name].append(measured)
    return samples


def copy_rate(clock: Clock, device: str, size: int) -> float:
    """Returns the bytes read and written per second in copying `size` bytes on the device; the median of 20."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = [clock.time(lambda: target.copy_(source))[0] for _ in range(23)][3:]
    return 2 * size / (1e-3 * spread(times)["median"])


def table(noted: dict, rate: float) -> str:
    """Returns one workload's table."""
    rows = []
    ours = noted["samples_ms"]["ours"]
    for name, samples in noted["samples_ms"].items():
        device, host = ([sample[i] for sample in samples if sample] for i in (0, 1))
        ratios = [a[0] / b[0] for a, b in zip(ours, samples, strict=True) if a and b]
        ratio = spread(ratios)
        whole_pass = name in ("ours", "ours_p1")
        of_copy = f"{noted['bytes'] / (1e-3 * spread(device)['median']) / rate:.2f}" if whole_pass else ""
        rows.append(
            [
                TITLES[name],
                f"{spread(device)['median']:.3g}",
                f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}]",
                of_copy,
                f"{spread(host)['median']:.3g}",
            ]
        )
    head = ["", "ms", "F to it", "of copy", "host ms"]
    title = f"## {noted['workload']}, {noted['weights'] / 1e6:.0f} M weights in {noted['tensors']} tensors, "
    return f"{title}{noted['dtype']}\n\n{markdown(head, rows)}"


def measure(clock: Clock, device: str, rounds: int, scale: int) -> dict:
    """Returns what is kept as JSON: the machine, its copying, and every sample of every workload."""
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
    for (workload, shapes), (dtype, torch_dtype) in itertools.product(GPU_WORKLOADS.items(), DTYPES.items()):
        scaled = [tuple(max(1, size // scale) for size in shape) for shape in shapes]
        work = make_workload(scaled, torch_dtype, device)
        noted = {"workload": workload, "dtype": dtype, "weights": work.weights, "tensors": len(work.params)}
        noted["bytes"] = BYTES[dtype] * work.weights
        noted["samples_ms"] = race(make_gpu_contestants(work), clock, rounds)
        data["measured"].append(noted)
        del work  # before the next one takes its memory
    return data


def report(data: dict) -> str:
    """Returns the tables, as Markdown."""
    machine, rate = data["machine"], data["copy_bytes_per_s"]
    about = (
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}; {data['date']}, commit {data['commit']}. "
        f"Copying moves {rate / 1e12:.2f} TB/s. Medians of {data['rounds']} rounds, quartiles in brackets; how it is "
        "measured: benchmarks/gpu.py."
    )
    return "\n\n".join(["# Benchmark results on a GPU", about, *(table(noted, rate) for noted in data["measured"])])


def main() -> None:
    """Reads the command line, measures and writes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only shows whether this program works (default: cuda)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes, to try this out (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args()
    data = measure(Clock(options.device), options.device, options.rounds, options.scale)
    text = report(data)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / re.sub(r"[^a-z0-9]+", "-", data["machine"]["gpu"].lower()).strip("-")
    base.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
