"""`python -m benchmarks.gpu` on the CPU, on a small scale: on a GPU it must not fail first."""

import json
import subprocess
import sys

import pytest

from childtune_fast.native import build


def test_it_measures_and_reports_everything(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--scale=64", "--rounds=1", f"--out={tmp_path}"]
    subprocess.run(command, cwd=build.csrc().parent, check=True, timeout=300)
    data = json.loads((tmp_path / "cpu.json").read_text())
    measured = {(each["workload"], each["dtype"]): each["samples_ms"] for each in data["measured"]}
    assert len(measured) == 8
    assert all(len(samples["ours"]) == 1 for samples in measured.values())
    assert all(noted["ms"] for noted in data["training"]["contestants"].values())
    report = (tmp_path / "cpu.md").read_text()
    assert "| D, p = 0.1, float32, to torch fused" in report
    assert "nan ms" not in report
