"""The real sources, built just in time in a fresh cache: what is said, what the binary needs, and its steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from childtune_fast.native import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_build(tmp_path_factory):
    """Returns the environment to use the built binary in, the binary, and what was printed."""
    folder = tmp_path_factory.mktemp("real")
    env = {**os.environ, "CHILDTUNE_FORCE_JIT": "1", "CHILDTUNE_CACHE": str(folder / "with space")}
    env.update(PYTHONPATH=str(build.PACKAGE.parent))
    env.pop("CHILDTUNE_BACKEND", None)
    code = "from childtune_fast.native import load; print(load.load_native().__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    return env, Path(ran.stdout.strip()), ran.stderr


def test_it_says_so_in_one_line(real_build):
    env, binary, errors = real_build
    assert errors.startswith(f"childtune_fast: building the native backend in {env['CHILDTUNE_CACHE']} (once; about")
    assert errors.count("\n") == 1
    assert str(binary.parent) == env["CHILDTUNE_CACHE"]


def test_it_needs_no_library_of_torch(real_build):
    _, binary, _ = real_build
    code = f"import ctypes; ctypes.CDLL({str(binary)!r}); print(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert binary.name in loaded
    assert "libtorch" not in loaded
    assert "libc10" not in loaded


def test_the_report_names_it_and_its_steps_are_right(real_build):
    """The report takes a step with both backends, and compares every bit."""
    env, binary, _ = real_build
    command = [sys.executable, "-m", "childtune_fast"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = dict(line.split(None, 1) for line in ran.stdout.splitlines())
    assert f"built just in time, {binary}" in ran.stdout
    assert lines["torch"].startswith(torch.__version__)
    assert "self-check        OK: " in ran.stdout
    assert ran.stderr == ""  # it was built before
