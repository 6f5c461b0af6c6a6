"""`childtune`, or `python -m childtune_fast`, prints the facts for a bug report and checks native against pure torch.

With "prove" it proves the kernels of GPUs; "fisher", "choose", "delta", "inspect" and "spectra" are in commands/.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .commands.running import new_parser
from .native import BackendError, build, gpu, load
from .ops import proof, prover, trust

SIZES = (1, 127, 128, 129, 4097)  # numbers of weights around 128, the size of a block of random masks
STEPS = 3
COMMAND = "`python -m childtune_fast prove`"
_OTHERS = {
    "fisher": "Fisher scores of a model on a data set, to a file",
    "choose": "the child network by such scores, as a file and a table",
    "delta": "what fine-tuning changed: make, apply, merge",
    "inspect": "what a file of ours holds",
    "spectra": "was a model trained on enough, layer by layer?",
}
_EXAMPLES = """  childtune                        what serves the CPU and each GPU, and why
  childtune info --json            the same for a program
  childtune prove                  compares every kernel of every GPU with the reference, bit for bit
  childtune fisher --help          each of the others has a help of its own, with examples
  childtune spectra my-model/ --base bert-base-uncased
"""


def main(*arguments: str) -> int:
    """Prints the report; "prove" proves the kernels of all GPUs; other words are commands of commands/.

    Args:
        arguments: those of the command line.

    Returns:
        0; 1 if a self-check or a proof fails; 2 if an argument or an environment variable is invalid.
    """
    if arguments and arguments[0] in _OTHERS:
        return int(importlib.import_module(f".commands.{arguments[0]}", __package__).main(arguments[1:]))
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as ended:  # --help, or an argument that it does not know, of which it has told
        return int(ended.code or 0)
    try:
        return prove() if options.command == "prove" else info(as_json=getattr(options, "json", False))
    except ValueError as error:
        print(f"childtune: {error}", file=sys.stderr)
        return 2


def console() -> int:
    """Runs `main` with the arguments of the command line: what `childtune` does."""
    return main(*sys.argv[1:])


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("", "Child-Tuning for PyTorch.", _EXAMPLES)
    parser.add_argument("--version", action="version", version=build.version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    report = commands.add_parser("info", help="facts for a bug report, and a self-check; what no COMMAND does too")
    report.add_argument("--json", action="store_true", help="prints a JSON list of pairs (label, value)")
    commands.add_parser("prove", help="proves the kernels of every GPU anew")
    for name, what in _OTHERS.items():
        commands.add_parser(name, help=what)
    return parser


def info(*, as_json: bool) -> int:
    """Prints what serves each device, and a self-check; returns 1 if that fails.

    Args:
        as_json: prints a JSON list of pairs (label, value).

    Raises:
        ValueError: an environment variable is invalid.
    """
    native = load.find_native()
    served = list(_devices(native))
    lines = [*_versions(), *_native(native), *served]
    if not as_json:  # before the self-check, which may end the process
        print("\n".join(f"{label:<18}{value}" for label, value in lines), flush=True)
    passed, checks = True, []
    devices = ["cpu", *(label.removeprefix("serves ") for label, value in served if value.startswith("native ("))]
    for device in dict.fromkeys(devices):
        said, right = self_check(native, device)
        checks.append((f"self-check{f' {device}' * (device != 'cpu')}", said))
        passed = passed and right
    if as_json:
        print(json.dumps([[label.strip(), value] for label, value in [*lines, *checks]], indent=1))
    else:
        print("\n".join(f"{label:<18}{value}" for label, value in checks))
    return 0 if passed else 1


def self_check(native: load.Native, device: str = "cpu") -> tuple[str, bool]:
    """Takes the same steps with the native backend on a device and with pure torch on the CPU; compares the weights.

    Returns:
        A sentence for the report, and False if a single bit differs or a step raises, else True.
    """
    if native.module is None:
        return "skipped: there is no native backend to compare with pure torch", True
    try:
        ours, expected = _steps("native", device), _steps("torch", "cpu")
    except Exception as error:  # the report must end with a line, whatever a step raises
        return f"FAILED: {type(error).__name__}: {error}", False
    differing = sum(
        int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in zip(ours, expected, strict=True)
    )
    if differing:
        return f"MISMATCH: {differing} of {sum(SIZES)} weights differ between native and torch; report this", False
    steps = f"{STEPS} steps of F and {STEPS} of D on {sum(SIZES)} weights"
    return f"OK: after {steps}, native and torch agree in every bit", True


def _steps(name: load.Backend, device: str) -> list[torch.Tensor]:
    """Returns float32 parameters, on the CPU, after steps of mode F, then of D, on a device, from fixed numbers."""
    from . import ChildAdamW, ChildNetwork

    random = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList(torch.randn(size, generator=random, device="cpu") for size in SIZES).to(device)
    masks = {
        name: (torch.rand(param.shape, generator=random, device="cpu") < 0.3).to(device)
        for name, param in model.named_parameters()
    }
    child = ChildNetwork.from_masks(model, masks)
    runs: tuple[dict[str, Any], ...] = ({"reserve_p": 0.3, "seed": 0}, {"child": child})
    for options in runs:
        optimizer = ChildAdamW(model.parameters(), lr=1e-2, backend=name, **options)
        for _ in range(STEPS):
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=random, device="cpu").to(device)
            optimizer.step()
    return [param.detach().cpu() for param in model.parameters()]


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
    try:
        yield "cache folder", str(jit.cache_folder())
    except BackendError as error:
        yield "cache folder", f"none ({error})"


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
        yield from _asking(device, functools.partial(_gpu_lines, device, asked))


def _asking(device: int, ask: Callable[[], Iterator[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Returns lines about a GPU, or one that says why it cannot be used now: another process may have it for itself."""
    try:
        return list(ask())
    except RuntimeError as error:
        return [(f"serves cuda:{device}", f"unknown: {str(error).splitlines()[0]}")]


def _gpu_lines(device: int, asked: str | None) -> Iterator[tuple[str, str]]:
    """Yields lines that say which backend serves a GPU, in which way its kernels are made, and if they are proved."""
    label, how = f"serves cuda:{device}", trust.setting()
    if asked == "torch" or how == "off":
        yield label, f"torch ({'CHILDTUNE_BACKEND=torch' if asked == 'torch' else 'CHILDTUNE_GPU=off'} asks for it)"
        return
    if asked == "native" or how == "trust":
        found = gpu.find(device)
        notes, variable = found.notes, "CHILDTUNE_BACKEND=native" if asked == "native" else "CHILDTUNE_GPU=trust"
        other = "none" if asked == "native" else "torch"
        kernels = f"native (kernels {found.origin}, not proved: {variable} asks for them)"
        yield label, kernels if found.kernels else f"{other}: it has no kernels"
    else:
        origin, known, notes = prover.look(device, gpu.properties(device))
        if torch.version.cuda is None:
            yield label, "torch, which was built without CUDA"
        elif known is not None:
            yield label, f"{'native' if known.word == 'good' else 'torch'} (kernels {origin}, {known})"
        elif origin and (why := prover.why_not()) and not why.here:
            yield label, f"torch (its kernels, {origin}, are not proved: {why.verdict.cause})"
        elif origin:
            yield label, f"torch, until its kernels, {origin}, are proved: by the first training, or by {COMMAND}"
        else:
            yield label, "torch: it has no kernels"
    for note in notes:
        yield "  because", note


def prove() -> int:
    """Proves the kernels of every GPU anew, and prints a table by kernel and dtype; returns 1 if one is not proved."""
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        print("there is no GPU that torch's CUDA can use, so there is nothing to prove")
        return 1
    if trust.setting() in ("off", "trust"):
        print(f"CHILDTUNE_GPU={trust.setting()} does not ask for a proof, so that the verdict will not be used")
    proved = list(map(_prove, range(torch.cuda.device_count())))
    return 0 if all(proved) else 1


def _prove(device: int) -> bool:
    """Proves the kernels of one GPU and prints what comes of it; returns whether they are proved."""
    try:
        properties = gpu.properties(device)
        print(f"GPU {device}: {properties.name}", flush=True)
        found = prover.find(device, properties, by_hand=True)
        told, ended = found.outcome.told, found.outcome.verdict
        if found.outcome.here and found.image:
            print(f"no second process can use it ({ended.cause}), so the cases run in this one", flush=True)
            told, ended = prover.prove_here(device, found)
    except (RuntimeError, AssertionError) as error:
        print(f"GPU {device}: {str(error).splitlines()[0]}")
        return False
    for line in _table(told):
        print(line)
    print(ended)
    facts = {**found.facts, "device code": str(found.facts.get("device code"))[:12], "made": found.origin}
    print("for a bug report: " + "; ".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"                  {ended.word}, {ended}; tried before: {'; '.join(found.notes) or 'nothing'}")
    return ended.word == "good"


def _table(told: Iterable[proof.Told]) -> Iterator[str]:
    """Yields lines: for each kernel and dtype, in how many cases its bits were right, and the seconds they took."""
    rows: dict[str, list[proof.Told]] = {}
    for case in told:
        rows.setdefault(case.case.partition(":")[0], []).append(case)
    for row, of_row in rows.items():
        right = sum(not case.differs for case in of_row)
        yield f"  {row:<36}{right:>3} of {len(of_row):>2} right{sum(case.seconds for case in of_row):>8.2f} s"
        for case in of_row:
            if case.differs:
                yield f"      {case.case.partition(': ')[2]}: {case.differs}"


def _cpu_name() -> str:
    """Returns the processor's name from Linux's /proc/cpuinfo, else what Python knows, such as its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(console())
