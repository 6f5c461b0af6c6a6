"""Processes that are killed while they step and save: each goes on, bit for bit, from the last whole checkpoint.

Nor is ever half a child network or half a delta in the place of a whole one.
"""

import os
import subprocess
import sys
from pathlib import Path

import killed_runs
import pytest
from helpers import both_backends


@pytest.mark.slow
@both_backends
def test_killed_runs_equal_one_that_was_not_interrupted(tmp_path, backend):
    support = Path(killed_runs.__file__).parent
    path = os.pathsep.join([str(support.parents[1]), str(support)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # one thread: a process with more cannot fork
    command = [sys.executable, killed_runs.__file__, backend, str(tmp_path)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    progressed, amid_writing = map(int, ran.stdout.split())
    assert progressed > killed_runs.KILLS / 4
    assert amid_writing > 0
