"""Twenty thousand calls with nonsense; `make fuzz` makes a million."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("fuzz.py")


def fuzz(*arguments):
    """Runs the fuzzer on the package that this process has; returns its exit status and what it printed."""
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    done = subprocess.run(command, cwd=DRIVER.parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_nonsense_never_crashes_writes_or_raises_a_bare_error(seed):
    status, output = fuzz("--calls", 10_000, "--seed", seed, "--jobs", 2)
    assert status == 0, output
    assert "0 crashes, 0 hangs, 0 bare errors, 0 raised but wrote, 0 writes outside, 0 miscounted" in output


def test_planted_faults_are_found():
    """A call that crashes, raises a bare error, writes before it raises, or writes beside its tensors."""
    status, output = fuzz("--planted", "--cases", 60, "--jobs", 2)
    assert status == 1, output
    for name, kind in (
        ("a bare error", "bare errors"),
        ("a late error", "raised but wrote"),
        ("a loss", "raised but wrote"),
        ("a write beside", "writes outside"),
    ):
        assert f"{kind}: planted: {name}" in output, output
    assert "crashes, exit status -11" in output
    assert "planted: a write\n" not in output
    case = output.split("crashes, exit status -11\n    python tests/fuzz/fuzz.py ")[1].split("\n")[0]
    assert fuzz("--planted", *case.split())[0] == -11
