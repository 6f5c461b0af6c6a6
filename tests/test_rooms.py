"""The layout: which folder may import which, no loops, one place that chooses who computes, and the reading order."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import childtune_fast
from childtune_fast import ChildAdamW, FisherAccumulator
from childtune_fast.native import gpu, load

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "childtune_fast"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
OPEN = {"_version", "arguments", "whole_file"}  # to all folders
# A folder, and the folders that it may import.
BELOW = {
    "commands": {"integrations", "spectra", "child", "fisher", "ops"},
    "integrations": {"optimizer", "spectra", "child", "fisher", "ops"},
    "optimizer": {"child", "ops", "native"},
    "fisher": {"ops"},
    "spectra": {"child", "ops"},
    "child": {"ops"},
    "ops": {"native"},
    "native": set(),
}
READING_LIMIT = 600  # lines
TOP = {".ci", ".clang-format", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"}
TOP |= {"benchmarks", "childtune_fast", "constraints.txt", "csrc", "docs", "examples", "findings", "pyproject.toml"}
TOP |= {".github", "MANIFEST.in", "setup.py", "tests"}


def imports_of(name):
    """Every module of the package that a module imports, at its top, in a function, or for types alone."""
    path = MODULES[name]
    folder = path.parent.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [
                alias.name.removeprefix("childtune_fast.") for alias in node.names if "childtune_fast" in alias.name
            ]
            found.update(names)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("childtune_fast")):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += [part for part in (node.module or "").split(".") if part and part != "childtune_fast"]
            for alias in node.names:
                module = ".".join([*base, alias.name])
                found.add(module if module in MODULES or f"{module}.__init__" in MODULES else ".".join(base))
    return {module if module in MODULES else f"{module}.__init__" if module else "__init__" for module in found}


def room_of(name):
    return name.partition(".")[0] if "." in name else ""


def test_folders_import_only_those_below_them():
    for name in MODULES:
        room = room_of(name)
        if not room:
            continue  # the package's face, and its report, which may show everything
        for imported in imports_of(name):
            assert imported in MODULES, f"{name} imports {imported}, which is no module"
            other = room_of(imported)
            assert other in {room, *BELOW[room]} or imported in OPEN, f"{name} must not import {imported}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_nothing_else_is_kept_at_the_top():
    """As a tool's output would be that was added by mistake."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.partition("/")[0] for line in tracked.splitlines()} == TOP


def test_what_all_import_imports_nothing_of_the_package():
    for name in OPEN:
        assert imports_of(name) == set()


def test_there_is_no_loop_of_imports():
    edges = {name: imports_of(name) for name in MODULES}
    for name in edges:
        if not name.endswith("__init__"):  # importing from a folder runs its __init__ first
            edges[name] |= {f"{room_of(i)}.__init__" for i in edges[name] if room_of(i) not in ("", room_of(name))}
    while free := {name for name, imported in edges.items() if not imported & edges.keys()}:
        edges = {name: imported for name, imported in edges.items() if name not in free}
    assert not edges, f"these import each other: {sorted(edges)}"


def test_setup_can_read_the_build_description_without_the_package():
    tree = ast.parse(MODULES["native.build"].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


# What one must name to find out whether kernels exist, or to decide between the CPU, a GPU and torch.
DECIDING = {"resolve", "chosen", "kernels_of", "find_native", "load_native", "load_kernels", "find"}
DECIDING |= {"native", "gpus", "on_gpus", "is_cuda", "import_module", "__import__"}


def deciding_names(name):
    """Which of these names a module imports, reads as an attribute, or, of builtins, calls."""
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.id for node in nodes if isinstance(node, ast.Name) and node.id == "__import__"]
    return sorted(DECIDING.intersection(names))


def test_only_ops_decides_between_the_cpu_a_gpu_and_torch():
    outside = {name for name in MODULES if room_of(name) not in ("ops", "native", "")}
    deciding = {name: names for name in outside if (names := deciding_names(name))}
    assert deciding.pop("optimizer.adamw") == ["find"]  # StepKernels.find
    assert deciding.pop("fisher.sums") == ["find"]  # SquareKernels.find, for a pass
    assert deciding.pop("optimizer.collect") == ["is_cuda"]  # of a learning rate
    assert deciding == {}
    adamw = MODULES["optimizer.adamw"].read_text(encoding="utf-8")
    assert re.findall(r"load\.(?!check\b|Backend\b)\w+.*", adamw) == []


def files_run_by(function):
    """The files of the package whose code a call runs."""
    seen = set()

    def note(frame, event, _):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return sorted(str(Path(path).relative_to(PACKAGE)) for path in seen if path.startswith(str(PACKAGE)))


def test_a_step_of_f_goes_through_six_files():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = ChildAdamW(params, backend="native")
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    files = files_run_by(optimizer.step)
    assert "ops/step.py" in files
    assert len(files) <= 6, files


def called_by_the_package():
    """Whether a line of the package did what the caller notes, itself or through os.getenv and Mapping.get."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in ("os", "_collections_abc", "collections.abc"):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(str(PACKAGE))


class CountedLock:
    def __init__(self, of, counts):
        self.of, self.counts = of, counts

    def __enter__(self):
        self.counts.append("lock")
        return self.of.__enter__()

    def __exit__(self, *details):
        return self.of.__exit__(*details)


@pytest.fixture
def asked(monkeypatch):
    """Notes each time that the package reads an environment variable, or takes a lock of its own."""
    counts = []
    read = type(os.environ).__getitem__

    def counted_read(environment, name):
        if called_by_the_package():
            counts.append(name)
        return read(environment, name)

    monkeypatch.setattr(type(os.environ), "__getitem__", counted_read)
    for module in (load, gpu):
        monkeypatch.setattr(module, "_lock", CountedLock(module._lock, counts))
    return counts


@pytest.mark.parametrize("pass_over", ["update", "estimate", "per example", "example by example"])
def test_a_gradient_in_the_fisher_pass_reads_no_environment_and_takes_no_lock(pass_over, asked, monkeypatch):
    """How often a pass does so does not depend on how many gradients it squares."""
    loss = {"loss_fn": lambda model, batch: model(batch).sum(), "progress": False}
    if pass_over == "example by example":
        monkeypatch.setattr("childtune_fast.fisher.examples._CHUNK_BYTES", 0)
    counts = []
    for layers in (1, 9):
        model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(layers)])
        fisher = FisherAccumulator(model)
        model(torch.ones(2, 3)).sum().backward()
        asked.clear()
        if pass_over == "update":
            fisher.update()
        else:
            batches = [torch.ones(2, 3)] * layers
            childtune_fast.estimate_fisher(model, batches, per_example="example" in pass_over, **loss)
        counts.append(list(asked))
    assert counts[0] == counts[1]
    assert "CHILDTUNE_BACKEND" in counts[0]
    assert "lock" in counts[0]


def lines_to_read(path, part):
    """How many lines a part of a file has: a heading's text before it, a definition, or all of it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if part.startswith("to "):
        return text.splitlines().index(part.removeprefix("to ").strip('"')) + 1
    if not part:
        return len(text.splitlines())
    named = {node.name: node for node in ast.parse(text).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    wanted = [named[name.strip("` ")] for name in part.split(",")]
    return sum(node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1 for node in wanted)


def test_the_reading_order_is_short():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\d+\. `([^`]+)`(?:, (to \"[^\"]+\"|`[^`]+`(?:, `[^`]+`)*))?", contributing, re.MULTILINE)
    assert len(rows) >= 7
    total = sum(
        lines_to_read(path, part.replace("`", "") if not part.startswith("to ") else part) for path, part in rows
    )
    assert total <= READING_LIMIT, f"the reading order has {total} lines"
    assert f"{total} lines" in contributing


def test_contributing_opens_with_the_tree():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```\n")[2].partition("```")[0]
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in ("__init__.py",) and "csrc" not in path.parts:
            assert path.name in tree, f"CONTRIBUTING's tree lacks {path.relative_to(ROOT)}"
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        names = {path.name, *(path.stem + suffix for suffix in (".h", ".cpp", ".*"))}  # a pair goes by one of its files
        assert any(name in tree for name in names) or path.match("isa_*.cpp"), f"CONTRIBUTING's tree lacks {path.name}"


def test_no_file_name_stands_in_both_tests_and_benchmarks():
    names = [{path.name for path in (ROOT / folder).rglob("*.py")} for folder in ("tests", "benchmarks")]
    assert names[0] & names[1] <= {"conftest.py", "__init__.py"}


PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|h|cpp|cu|md|sh|toml|txt))\b")


def test_every_file_that_the_docs_name_is_there():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
    named = [(document, path) for document in documents for path in PATH.findall(document.read_text(encoding="utf-8"))]
    assert len(named) > 20
    for document, path in named:
        places = (ROOT, PACKAGE, ROOT / "csrc", document.parent)
        assert any((place / path).exists() for place in places), f"{document.name} names {path}, which is not there"
