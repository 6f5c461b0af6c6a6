"""The promises on speed and memory, each with a function that reads the measured value from a result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]  # a part of pytest-benchmark's JSON


# Limit of interruptions per second. Two threads on two idle cores saw at most 50, and with one busy process beside them
# 250. At 250, torch's fused step, which waits for its slowest thread, takes ten times as long, so that every promise
# would seem kept.
QUIET = 80


class Results:
    """The benchmarks in one JSON file of pytest-benchmark."""

    def __init__(self, data: Record) -> None:
        self.machine: Record = data["machine_info"]
        self.commit: Record = data["commit_info"]
        self.date: str = data["datetime"][:10]
        self._by_name = {bench["name"]: bench["extra_info"] for bench in data["benchmarks"]}

    def interruptions(self) -> list[float]:
        """Returns the interruptions per second of each benchmark that counts them."""
        key = "interruptions_per_s"
        return [noted[key] for noted in self._by_name.values() if key in noted]

    def cost(self, name: str) -> Record:
        """Returns what test_<name> noted; raises KeyError if it was not run."""
        return self._by_name[f"test_{name}"]

    def find(self, name: str) -> Record:
        """Returns what test_<name> noted; {} if it was not run."""
        return self._by_name.get(f"test_{name}", {})

    def step(self, workload: str, dtype: str, threads: int) -> Record:
        """Returns what test_step noted on one workload; raises KeyError if it was not run."""
        return self._by_name[f"test_step[{workload}-{dtype}-{threads}]"]

    def by_threads(self, name: str) -> dict[str, Record]:
        """Returns {title: what test_<name> noted} for each number of threads that it was run with."""
        noted = {threads: self._by_name.get(f"test_{name}[{threads}]") for threads in (2, 1)}
        return {f"{threads} thread{'s' * (threads > 1)}": record for threads, record in noted.items() if record}

    def steps(self, workload: str) -> dict[str, Record]:
        """Returns {title: what test_step noted} for each dtype and number of threads that were measured."""
        return {
            f"{dtype}, {threads} thread{'s' * (threads > 1)}": self._by_name[name]
            for dtype in ("float32", "bfloat16")
            for threads in (2, 1)
            if (name := f"test_step[{workload}-{dtype}-{threads}]") in self._by_name
        }


@dataclass(frozen=True)
class Promise:
    """One line of the table of promises.

    Attributes:
        text: description of what is measured.
        at_most: the promised upper bound.
        show: function that formats the bound and the measured values.
        read: function that returns the measured value of a result: one number, or a dict of median and quartiles. It
            raises KeyError if nothing was measured.
    """

    text: str
    at_most: float
    show: Callable[[float], str]
    read: Callable[[Results], Record | float]


def _ratio(workload: str, dtype: str, threads: int, other: str = "fused", ours: str = "ours") -> Callable:
    def read(results: Results) -> Record:
        step = results.step(workload, dtype, threads)
        return _judged(step["ratios"][ours][other], step)

    return read


def _judged(ratio: Record, noted: Record) -> Record:
    return {**ratio, "disturbed": noted.get("interruptions_per_s", 0.0) >= QUIET}


def _fisher_ratio(other: str) -> Callable:
    def read(results: Results) -> Record:
        noted = results.cost("fisher[2]")
        return _judged(noted["ratios"][other], noted)

    return read


def _pass_ratio(size: str, ours: str) -> Callable:
    def read(results: Results) -> Record:
        noted = results.cost(f"fisher_pass[{size}]")
        return _judged(noted["ratios"][ours]["plain"], noted)

    return read


def _child_ratio(ours: str) -> Callable:
    def read(results: Results) -> Record:
        noted = results.cost("child_step[2]")
        return _judged(noted["ratios"][ours]["fused"], noted)

    return read


def _choice_ratio(results: Results) -> Record:
    noted = results.cost("selection")
    return _judged(noted["ratios"]["percentile"], noted)


def _spectra_ratio(ours: str) -> Callable:
    def read(results: Results) -> Record:
        noted = results.cost("spectra")
        return _judged(noted["ratios"][ours], noted)

    return read


def _spectra_memory(layer: str, parts: dict[str, int]) -> Callable:
    """Returns a function that reads a layer's extra memory in float64, by so many times its yardsticks together."""

    def read(results: Results) -> float:
        noted = results.cost("spectra_memory")
        sizes = noted["yardsticks"][layer]
        return noted["extra_bytes"][layer]["float64"] / sum(times * sizes[part] for part, times in parts.items())

    return read


def _unit(unit: str, digits: int = 1) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f} {unit}"


_BERT, _TINY, _FP32 = "bert-base", "1000x33", "float32"
_plain = "{:.2f}".format


def _fraction(value: float) -> str:
    return f"1/{1 / value:.0f}"


def _per_weight(results: Results, count: int) -> float:
    return count / results.cost("child_state")["weights"]


PROMISES = [
    Promise("F, fp32, BERT-base, 2 threads: to torch fused", 0.95, _plain, _ratio(_BERT, _FP32, 2)),
    Promise("the same on 1 thread", 0.95, _plain, _ratio(_BERT, _FP32, 1)),
    Promise("the same on 2 threads: to the naive published step", 1 / 30, _fraction, _ratio(_BERT, _FP32, 2, "naive")),
    Promise("p = 1, fp32, BERT-base, 2 threads: to torch fused", 0.92, _plain, _ratio(_BERT, _FP32, 2, ours="ours_p1")),
    Promise("the same on 1 thread", 0.92, _plain, _ratio(_BERT, _FP32, 1, ours="ours_p1")),
    Promise("F, 1000 tensors of 33, fp32, 2 threads: to torch fused", 0.30, _plain, _ratio(_TINY, _FP32, 2)),
    Promise("the same on 1 thread", 0.50, _plain, _ratio(_TINY, _FP32, 1)),
    Promise(
        "F, bf16 with fp32 state, BERT-base, 2 threads: to torch fused, all bf16",
        1.00,
        _plain,
        _ratio(_BERT, "bfloat16", 2),
    ),
    Promise("the same on 1 thread", 1.00, _plain, _ratio(_BERT, "bfloat16", 1)),
    Promise(
        "Fisher accumulation, 84 M weights, 2 threads: to `F.add_(g * g)`", 0.65, _plain, _fisher_ratio("add_product")
    ),
    Promise("the same to `F.addcmul_(g, g)`", 1.00, _plain, _fisher_ratio("addcmul")),
    Promise(
        "Fisher pass, MiniLM's sizes, 16 x 64 tokens, 2 threads: to a forward and backward pass",
        1.06,
        _plain,
        _pass_ratio("16x64", "batch"),
    ),
    Promise("the same with each example's own gradient", 1.40, _plain, _pass_ratio("16x64", "per_example")),
    Promise("the same, 32 x 128 tokens", 1.40, _plain, _pass_ratio("32x128", "per_example")),
    Promise("D, p = 0.3, fp32, 84 M weights, 2 threads: to torch fused", 0.70, _plain, _child_ratio("ours")),
    Promise("the same at p = 0.1", 0.62, _plain, _child_ratio("ours_p0.1")),
    Promise(
        "optimizer state of D at p = 0.3, per maskable weight; dense it is 8",
        2.6,
        _unit("bytes", 2),
        lambda results: _per_weight(results, results.cost("child_state")["state_bytes"]["child"]),
    ),
    Promise(
        "its mask in memory, per weight",
        0.15,
        _unit("bytes", 3),
        lambda results: _per_weight(results, results.cost("child_state")["mask_bytes"]),
    ),
    Promise(
        "choice of a child network among 302 M scores, 2 threads: to `np.concatenate` + `np.percentile`",
        1 / 10,
        _fraction,
        _choice_ratio,
    ),
    Promise(
        "its memory beside scores and masks",
        64,
        _unit("MB"),
        lambda results: results.cost("selection_memory")["extra_bytes"]["ours"] / 1e6,
    ),
    Promise(
        "delta file at p = 0.3: to the full checkpoint",
        0.34,
        "{:.3f}".format,
        lambda results: results.cost("delta_file")["ratio"],
    ),
    Promise(
        "spectra of MiniLM's 39 layers in float64, CPU time on 1 thread: to weightwatcher 0.7.7",
        0.45,
        _plain,
        _spectra_ratio("float64"),
    ),
    Promise("the same in float32", 0.25, _plain, _spectra_ratio("float32")),
    Promise(
        "their memory beside a model of 8192 x 2048, float64: to the layer in float64 and its Gram matrix",
        1.00,
        _plain,
        _spectra_memory("8192 x 2048", {"layer": 1, "gram": 1}),
    ),
    Promise(
        "the same, 4096 x 4096: to these and the eigensolver's copy of the Gram matrix",
        1.00,
        _plain,
        _spectra_memory("4096 x 4096", {"layer": 1, "gram": 2}),
    ),
    Promise(
        "memory that torch allocates in a step after the first",
        0,
        _unit("bytes", 0),
        lambda results: results.cost("memory_of_a_step")["allocated"]["ours"]["torch_bytes"],
    ),
    Promise(
        "just-in-time build, cold",
        25,
        _unit("s"),
        lambda results: results.cost("cold_build_in_a_new_process")["seconds"],
    ),
    Promise(
        "`import childtune_fast` beyond `import torch`",
        50,
        _unit("ms"),
        lambda results: results.cost("import_in_a_new_process")["milliseconds"],
    ),
    Promise(
        "Python overhead of a step per parameter tensor",
        2.5,
        _unit("us"),
        lambda results: results.cost("python_overhead")["overhead_us_per_tensor"],
    ),
]
