"""Measures the table of a model's spectra: CPU time and memory of ours, and of weightwatcher."""

import math
import random
import time
from importlib.util import find_spec

import pytest

from .costs import number_in_new_process
from .race import spread
from .spectra_workers import LAYERS, NAMES, OBLONG, ONE_THREAD, PACKAGE, WATCHER, workers, yardstick


@pytest.fixture(autouse=True)
def packages():
    """Skips where the model's package or weightwatcher's is missing; this process must not import the latter."""
    for name in (PACKAGE, WATCHER):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_spectra(benchmark, rounds):
    """MiniLM's table by each in turn, in random order, with one thread; the fixture times the whole rounds."""
    samples, found = {name: [] for name in NAMES}, {}
    order = random.Random(0)
    with workers() as of_name:

        def one_round():
            for name in order.sample(NAMES, len(NAMES)):
                found[name] = of_name[name].answer()
                samples[name].append(found[name]["cpu_s"])
                interruptions.append(found[name]["interruptions"])

        interruptions = []
        one_round()  # the first, in which the processes start too, is not counted
        interruptions.clear()
        start = time.perf_counter()
        benchmark.pedantic(one_round, rounds=rounds(7))
        seconds = time.perf_counter() - start
    counted = {name: of_one[1:] for name, of_one in samples.items()}
    ours = found["float64"]["alphas"]
    assert max(abs(a - b) for a, b in zip(ours, found[WATCHER]["alphas"], strict=True)) < 1e-6  # the same work
    benchmark.extra_info.update(
        layers=len(ours),
        cpu_s={name: spread(of_one) for name, of_one in counted.items()},
        ratios={name: spread(_ratios(counted[name], counted[WATCHER])) for name in NAMES if name != WATCHER},
        interruptions_per_s=sum(interruptions) / seconds,
        samples_s=counted,
    )


def _ratios(ours, theirs):
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def test_spectra_memory(benchmark):
    """Measures the memory in `extra_bytes`, on which the promise is; the fixture times the processes."""
    found = {layer: {} for layer in LAYERS}

    def processes():
        for layer, of_layer in found.items():
            for name in NAMES if layer == OBLONG else NAMES[:1]:
                code = f"from benchmarks.spectra_workers import extra_memory; print(extra_memory({name!r}, {layer!r}))"
                extra = number_in_new_process(code, **ONE_THREAD)
                if not math.isnan(extra):
                    of_layer[name] = extra

    benchmark.pedantic(processes)
    benchmark.extra_info.update(extra_bytes=found, yardsticks={layer: yardstick(layer) for layer in LAYERS})
