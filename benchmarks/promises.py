"""The promises on speed and memory, each with a function that reads the measured value from a result."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .eight_bit_peers import PEERS
from .readings import Ratio, Record, Results

AT_THE_ROOF = 1.03  # a step that takes at most so many times as long as its bytes alone is as fast as memory


@dataclass(frozen=True)
class Promise:
    """One line of the table of promises.

    Attributes:
        name: description of what is measured.
        at_most: the promised upper bound.
        show: function that formats the bound and the measured values.
        read: function that returns the measured value of a result: one number, or a dict of median and quartiles. It
            raises KeyError if nothing was measured.
        threads: number of threads, where there is a promise for each; None if the name says it (default: None).
        narrower: {instruction set: bound in it}; where a processor's widest is such a set, that bound replaces
            `at_most` (default: {}).
        note: what is added to the text (default: "").
    """

    name: str
    at_most: float
    show: Callable[[float], str]
    read: Callable[[Results], Record | float]
    threads: int | None = None
    narrower: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def text(self) -> str:
        """The line's first cell."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return self.name + threads + self.note


def promised(results: Results) -> list[Promise]:
    """Returns what is promised on the machine of a result.

    Bounds for a narrower instruction set hold for the widest run where that is the processor's widest set, and for a
    run that is held to the set where the processor has wider ones.
    """
    *narrower, widest = results.instruction_sets
    native = [
        replace(promise, at_most=promise.narrower[widest], note=f" (bound for {widest})")
        if widest in promise.narrower
        else promise
        for promise in PROMISES
    ]
    held = [
        replace(
            promise,
            name=f"{promise.name}, held to {instruction_set}",
            at_most=promise.narrower[instruction_set],
            read=promise.read.held_to(instruction_set),
        )
        for instruction_set in reversed(narrower)
        for promise in PROMISES
        if instruction_set in promise.narrower
    ]
    return native + held


def verdict(promise: Promise, found: Record) -> str:
    """Returns whether a promise was kept: "met", "**missed**", "at the roof" or "disturbed".

    "at the roof" is a bound that this machine's memory forbids: it is missed, but moving the bytes alone takes as long.
    """
    if found.get("disturbed"):
        return "disturbed"
    if found["median"] <= promise.at_most:
        return "met"
    to_roof = found.get("to_roof")
    return "at the roof" if to_roof is not None and to_roof <= AT_THE_ROOF else "**missed**"


def _spectra_memory(layer: str, parts: dict[str, int]) -> Callable:
    """Returns a function that reads a layer's extra memory in float64, by so many times its yardsticks together."""

    def read(results: Results) -> float:
        noted = results.cost("spectra_memory")
        sizes = noted["yardsticks"][layer]
        return noted["extra_bytes"][layer]["float64"] / sum(times * sizes[part] for part, times in parts.items())

    return read


def _unit(unit: str, digits: int = 1) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f} {unit}"


_plain = "{:.2f}".format


def _fraction(value: float) -> str:
    return f"1/{1 / value:.0f}"


def _per_weight(results: Results, count: int) -> float:
    return count / results.cost("child_state")["weights"]


def _step(
    name: str,
    bounds: tuple[float, ...],
    ours: str,
    bench: str,
    other: str = "fused",
    **narrower: tuple[float, float],
) -> list[Promise]:
    """Returns the promises on a step with 2 threads and with 1, which `bounds` and each of `narrower` are for.

    With one bound alone it is of 2 threads.
    """
    return [
        Promise(
            name,
            bound,
            _plain,
            Ratio(bench.format(threads), other, ours),
            threads,
            {instruction_set: pair[i] for instruction_set, pair in narrower.items()},
        )
        for i, (threads, bound) in enumerate(zip((2, 1), bounds, strict=False))
    ]


_FP32, _BF16, _FP16 = (f"step[bert-base-{dtype}-{{}}]" for dtype in ("float32", "bfloat16", "float16"))
_CHILD = "child_step[{}]"
_LOW_FP32, _LOW_BF16 = (f"low_bit_step[{dtype}-{{}}]" for dtype in ("float32", "bfloat16"))

PROMISES = [
    *_step("F, float32", (0.93, 0.91), "ours", _FP32, avx2=(1.00, 1.00), baseline=(1.4, 1.4)),
    *_step("p = 1, float32", (0.93, 0.91), "ours_p1", _FP32, avx2=(0.95, 0.95)),
    *_step("F, float32: to the roof", (1.03, 1.03), "ours", _FP32, other="roof"),
    *_step("F, bfloat16: to all-bfloat16", (0.70, 0.66), "ours", _BF16, avx2=(1.00, 1.00)),
    *_step("p = 1, bfloat16: to all-bfloat16", (0.62, 0.58), "ours_p1", _BF16),
    *_step("F, float16: to all-float16", (0.85, 0.80), "ours", _FP16),
    *_step("p = 1, float16: to all-float16", (0.85, 0.80), "ours_p1", _FP16),
    *_step("F, 1000 tensors of 33, float32", (0.20, 0.25), "ours", "step[1000x33-float32-{}]"),
    *_step("D, p = 0.3, float32", (0.65, 0.65), "ours", _CHILD, avx2=(0.80, 0.80), baseline=(1.5, 1.5)),
    *_step("D, p = 0.1, float32", (0.53, 0.53), "ours_p0.1", _CHILD, avx2=(0.65, 0.65), baseline=(1.0, 1.0)),
    *_step("F, float32, 8-bit state", (0.66,), "ours", _LOW_FP32),
    *_step("p = 1, float32, 8-bit state", (0.62,), "ours_p1", _LOW_FP32),
    *_step("D, p = 0.3, float32, 8-bit state", (0.56,), "ours", "low_bit_child_step[{}]"),
    *_step("F, bfloat16, 8-bit state: to all-bfloat16", (0.82,), "ours", _LOW_BF16),
    *(
        Promise(
            f"F, float32, 8-bit state, 2 threads: to AdamW8bit of {peer}",
            1 / 20,
            _fraction,
            Ratio(_LOW_FP32.format(2), peer, "ours"),
        )
        for peer in PEERS
    ),
    Promise(
        "F, float32, 2 threads: to the naive published step",
        1 / 30,
        _fraction,
        Ratio(_FP32.format(2), "naive", "ours"),
    ),
    *(
        Promise(f"fine-tuning step of {model}, {method}", 1.00, _plain, Ratio(f"training_step[{size}]", "fused", ours))
        for size, model in (("minilm", "MiniLM"), ("bert-base", "BERT-base"))
        for ours, method in (("ours", "F"), ("child", "D, p = 0.3"))
    ),
    Promise(
        "Fisher accumulation, 84 M weights, 2 threads: to `F.add_(g * g)`",
        0.65,
        _plain,
        Ratio("fisher[2]", "add_product"),
    ),
    Promise("the same to `F.addcmul_(g, g)`", 1.00, _plain, Ratio("fisher[2]", "addcmul")),
    Promise(
        "Fisher pass, MiniLM's sizes, 16 x 64 tokens, 2 threads: to a forward and backward pass",
        1.06,
        _plain,
        Ratio("fisher_pass[16x64]", "plain", "batch"),
    ),
    Promise(
        "the same with each example's own gradient", 1.40, _plain, Ratio("fisher_pass[16x64]", "plain", "per_example")
    ),
    Promise("the same, 32 x 128 tokens", 1.40, _plain, Ratio("fisher_pass[32x128]", "plain", "per_example")),
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
    *(
        Promise(
            f"8-bit state of {method}, masks included, per weight",
            at_most,
            _unit("bytes", 2),
            lambda results, name=name: results.cost("low_bit_state")["bytes_per_weight"][name],
        )
        for name, method, at_most in (
            ("ours", "F", 2.1),
            ("child", "D at p = 0.3", 0.80),
            ("child_p0.1", "D at p = 0.1", 0.36),
        )
    ),
    Promise(
        "choice of a child network among 302 M scores, 2 threads: to `np.concatenate` + `np.percentile`",
        1 / 10,
        _fraction,
        Ratio("selection", "percentile"),
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
        Ratio("spectra", "float64"),
    ),
    Promise("the same in float32", 0.25, _plain, Ratio("spectra", "float32")),
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
