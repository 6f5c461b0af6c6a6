"""Measures other costs: memory of a step, 8-bit state, Python around the compiled call, import, just-in-time build."""

import itertools

import torch

from childtune_fast import ChildAdamW
from childtune_fast.native import load

from .contestants import HYPER, make_contestants, make_parameters, random_child
from .costs import (
    TimedCall,
    held_bytes,
    python_allocations,
    resident_growth,
    seconds_in_new_process,
    state_tensors,
    torch_allocations,
)
from .race import spread
from .workloads import LARGE, WORKLOADS, make_workload

SINGLES = 1000  # number of parameters of one element each, whose step is almost only overhead


def test_memory_of_a_step(benchmark, rounds, quiet_process):
    work = make_workload(WORKLOADS["bert-base"], torch.float32)
    contestants = make_contestants(work)
    contestants["ours"].step()
    benchmark.pedantic(contestants["ours"].step, rounds=rounds(5))
    measured = {}
    for name in ("ours", "fused", "foreach", "naive"):
        step = contestants[name].step
        step()
        measured[name] = {
            "torch_bytes": torch_allocations(step),
            "resident_bytes": resident_growth(step),
            "python_bytes": python_allocations(step),
        }
    benchmark.extra_info.update(weights=work.weights, tensors=len(work.params), allocated=measured)


def test_low_bit_state(benchmark, rounds):
    """Measures the tensors of 8-bit state after a step, masks included, in bytes for each weight."""
    work = make_workload(LARGE[:2], torch.float32)
    params = make_parameters(work, work.grads)
    children = {"child": random_child(params, 0.3), "child_p0.1": random_child(params, 0.1)}
    optimizers = {"ours": ChildAdamW(params, **HYPER, reserve_p=0.3, state="8bit")}
    optimizers |= {name: ChildAdamW(params, **HYPER, child=child, state="8bit") for name, child in children.items()}
    benchmark.pedantic(lambda: [optimizer.step() for optimizer in optimizers.values()], rounds=rounds(1))
    sizes = {name: held_bytes(state_tensors(optimizer)) for name, optimizer in optimizers.items()}
    benchmark.extra_info.update(
        weights=work.weights, bytes_per_weight={name: size / work.weights for name, size in sizes.items()}
    )


def test_python_overhead(benchmark, monkeypatch, rounds, quiet_process):
    """Measures the time of a step minus that of the compiled call inside it."""
    torch.set_num_threads(1)
    step = make_contestants(make_workload([(1,)] * SINGLES, torch.float32))["ours"].step
    native = load.load_native()
    compiled = TimedCall(native.step)
    monkeypatch.setattr(native, "step", compiled)
    benchmark.pedantic(step, rounds=rounds(301), warmup_rounds=10)
    steps = benchmark.stats.stats.data
    calls = compiled.seconds[-len(steps) :]
    benchmark.extra_info.update(
        tensors=SINGLES,
        step_us_per_tensor=spread([1e6 * step / SINGLES for step in steps]),
        compiled_us_per_tensor=spread([1e6 * call / SINGLES for call in calls]),
        overhead_us_per_tensor=spread([1e6 * (step - call) / SINGLES for step, call in zip(steps, calls, strict=True)]),
    )


def test_import_in_a_new_process(benchmark, rounds):
    """Measures the import in `milliseconds`, on which the promise is; the fixture times the whole process."""
    samples = []

    def process():
        keep = {"PYTHONDONTWRITEBYTECODE": ""}  # the warm-up round writes bytecode, which an installed package has
        # After `import torch` Python is about to look through all of torch's objects, and does so at the next thousand
        # allocations, whoever makes them.
        before = "import gc, torch; gc.collect()"
        samples.append(1e3 * seconds_in_new_process(before, "import childtune_fast", **keep))

    benchmark.pedantic(process, rounds=rounds(7), warmup_rounds=1)
    benchmark.extra_info.update(milliseconds=spread(samples[1:]), samples_ms=samples[1:])


def test_cold_build_in_a_new_process(benchmark, rounds, tmp_path):
    """Measures a just-in-time build in an empty cache folder, as a user without a prebuilt binary sees it."""
    samples = []
    folders = (tmp_path / str(i) for i in itertools.count())

    def process():
        environment = {"CHILDTUNE_FORCE_JIT": "1", "CHILDTUNE_CACHE": str(next(folders)), "CHILDTUNE_BACKEND": ""}
        before = "import torch; from childtune_fast.native import load"
        samples.append(seconds_in_new_process(before, "load.load_native()", **environment))

    benchmark.pedantic(process, rounds=rounds(2))
    benchmark.extra_info.update(seconds=spread(samples), samples_s=samples)
