"""`python -m childtune_fast` prints the facts for a bug report and checks the native backend against pure torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .native import CudaError, build, gpu, load

SIZES = (1, 127, 128, 129, 4097)  # numbers of weights around 128, the size of a block of random masks
STEPS = 3


def main() -> int:
    """Prints the report; returns 1 if the self-check fails, 2 if an environment variable is invalid, else 0."""
    try:
        native = load.find_native()
        served = list(_devices(native))
    except ValueError as error:
        print(error)
        return 2
    for label, value in [*_versions(), *_native(native), *served]:
        print(f"{label:<18}{value}")
    verdict, passed = self_check(native)
    print(f"{'self-check':<18}{verdict}")
    return 0 if passed else 1


def self_check(native: load.Native) -> tuple[str, bool]:
    """Takes the same steps with both backends and compares the weights.

    Returns:
        A sentence for the report, and False if a single bit differs or a step raises, else True.
    """
    if native.module is None:
        return "skipped: there is no native backend to compare with pure torch", True
    try:
        ours, expected = _steps("native"), _steps("torch")
    except Exception as error:  # the report must end with a line, whatever a step raises
        return f"FAILED: {type(error).__name__}: {error}", False
    differing = sum(
        int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in zip(ours, expected, strict=True)
    )
    if differing:
        return (
            f"MISMATCH: {differing} of {sum(SIZES)} weights differ between native and torch; please report this",
            False,
        )
    return (
        f"OK: after {STEPS} steps of F and {STEPS} of D on {sum(SIZES)} weights, native and torch agree in every bit",
        True,
    )


def _steps(name: load.Backend) -> list[torch.Tensor]:
    """Returns float32 parameters after steps of mode F, then of mode D, with a backend, from fixed random numbers."""
    from . import ChildAdamW, ChildNetwork

    random = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList(torch.randn(size, generator=random, device="cpu") for size in SIZES)
    masks = {
        key: torch.rand(param.shape, generator=random, device="cpu") < 0.3 for key, param in model.named_parameters()
    }
    child = ChildNetwork.from_masks(model, masks)
    runs: tuple[dict[str, Any], ...] = ({"reserve_p": 0.3, "seed": 0}, {"child": child})
    for options in runs:
        optimizer = ChildAdamW(model.parameters(), lr=1e-2, backend=name, **options)
        for _ in range(STEPS):
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=random, device="cpu")
            optimizer.step()
    return [param.detach() for param in model.parameters()]


def _versions() -> Iterator[tuple[str, str]]:
    yield "childtune_fast", f"{build.version()} in {build.PACKAGE}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "numpy", importlib.metadata.version("numpy")
    yield "system", platform.platform()
    yield "CPU", f"{_cpu_name()}, {os.cpu_count()} logical cores"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "GPU", ", ".join(gpus) or "none that torch can use"


def _native(native: load.Native) -> Iterator[tuple[str, str]]:
    from .native import jit

    module = native.module
    if module is None:
        yield "native backend", "none"
    else:
        yield "native backend", f"{native.origin}, {module.__file__}"
        yield "compiled by", module.compiler()
        yield (
            "instruction set",
            f"{module.instruction_set()} (this CPU has: {', '.join(module.supported_instruction_sets())})",
        )
        yield "parallel runtime", module.parallel_runtime()
    for note in native.notes:
        yield "  because", note
    yield "cache folder", str(jit.cache_folder())


def _devices(native: load.Native) -> Iterator[tuple[str, str]]:
    """Yields lines that say which backend serves each device if the code asks for "auto", and why."""
    asked = os.environ.get("CHILDTUNE_BACKEND")
    if asked:
        load.check(asked, "the environment variable CHILDTUNE_BACKEND")
    if asked == "torch":
        why = "torch (CHILDTUNE_BACKEND=torch asks for it)"
    elif native.module is None:
        why = (
            "none: CHILDTUNE_BACKEND=native forbids torch"
            if asked == "native"
            else "torch (no native backend, see above)"
        )
    else:
        why = f"native ({native.origin})"
    yield "serves cpu", why
    for device in range(torch.cuda.device_count()):
        yield from _gpu_lines(device, asked)


def _gpu_lines(device: int, asked: str | None) -> Iterator[tuple[str, str]]:
    """Yields lines that say which backend serves a GPU, and in which way its kernels are made."""
    try:
        found = gpu.find(device)
    except CudaError as error:
        yield f"serves cuda:{device}", f"unknown: {error}"
        return
    kernels = f"kernels {found.origin}" if found.kernels else "no kernels"
    if asked == "native":
        yield f"serves cuda:{device}", f"native ({kernels})" if found.kernels else "none: it has no kernels"
    else:
        yield f"serves cuda:{device}", f"torch ({kernels}; CHILDTUNE_BACKEND=native would ask for them)"
    for note in found.notes:
        yield "  because", note


def _cpu_name() -> str:
    """Returns the processor's name from Linux's /proc/cpuinfo, else what Python knows, such as its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
