"""With a prebuilt binary, nothing is compiled, nothing written, and nothing printed that is not asked for."""

import pytest
from processes import python, result_of, script

from childtune_fast.native import load

COMPILERS = ("c++", "g++", "cc", "gcc", "clang++", "nvcc", "ninja")
STEP = """
import torch
from childtune_fast import ChildAdamW
param = torch.nn.Parameter(torch.ones(1000))
param.grad = torch.ones(1000)
ChildAdamW([param], reserve_p=0.3).step()
"""
# A torch that was built for GPUs and finds none prints a line on CUDA_HOME when its module for extensions is imported.
REPORT = """
import sys
from childtune_fast.__main__ import main
code = main()
assert "torch.utils.cpp_extension" not in sys.modules
raise SystemExit(code)
"""


@pytest.fixture
def watched(tmp_path):
    """Returns environment variables for a process whose compilers and files, but for caches of bytecode, are seen."""
    if load.find_native().origin != "prebuilt":
        pytest.skip("needs a prebuilt binary")
    tools, home = tmp_path / "tools", tmp_path / "home"
    tools.mkdir()
    home.mkdir()
    for name in COMPILERS:
        script(tools / name, f'echo {name} "$@" >>{tmp_path / "called"}; exit 1')
    folders = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
    cleared = dict.fromkeys(("CHILDTUNE_CACHE", "CHILDTUNE_FORCE_JIT", "CHILDTUNE_BACKEND", "TORCH_EXTENSIONS_DIR"), "")
    found = {"PATH": str(tools), "CXX": str(tools / "c++"), "CUDA_HOME": str(tools), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**folders, **cleared, **found}


def files_in(folder):
    """Folders do not count: torch makes an empty one, of inductor, for any of its optimizers."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


def test_a_first_step_calls_no_compiler_and_prints_and_writes_nothing(watched, tmp_path):
    assert result_of(python(STEP, **watched)) == ("", "")
    assert not (tmp_path / "called").exists()
    assert not files_in(tmp_path / "home")


def test_the_report_has_no_lines_but_its_own(watched, tmp_path):
    output, errors = result_of(python(REPORT, **watched))
    assert errors == ""
    assert all(line[:18].rstrip() and line[18:].strip() for line in output.splitlines())
    assert not (tmp_path / "called").exists()
    assert not files_in(tmp_path / "home")
