"""`python -m benchmarks.scale`: its table is that of docs/scale.md, and it measures."""

import re
import subprocess
import sys

import pytest

from benchmarks import scale
from childtune_fast.native import build

ROOT = build.csrc().parent


def test_the_documented_table_is_the_programs():
    pytest.importorskip("transformers")
    assert "\n".join(scale.table(0.3)) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_it_measures_every_option():
    command = [sys.executable, "-m", "benchmarks.scale", "--overhead"]
    found = subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True, text=True).stdout
    assert len(re.findall(r": [\d.]+ us whole, [\d.]+ us sharded, [\d.]+ times$", found, re.MULTILINE)) == 4
