"""`python -m childtune_fast spectra`."""

import json

import pytest
import torch
from safetensors.torch import save_file

from childtune_fast import __main__, spectra


@pytest.fixture
def stored(tmp_path):
    """The folders of a base and of a model that was made of it."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(24, 16), "b.weight": torch.randn(16, 16), "c.weight": torch.randn(3, 16)}
    tuned = {**base, "a.weight": base["a.weight"] + torch.eye(24, 16)}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return str(tmp_path / "base"), str(tmp_path / "tuned")


def test_a_model_s_table_is_printed(stored, capsys):
    assert __main__.main("spectra", stored[0]) == 0
    expected = spectra.analyze(stored[0], progress=False)
    skipped = "  skipped c: 3 eigenvalues, which are fewer than 8"
    assert capsys.readouterr().out == f"{expected}\n{skipped}\n"


def test_null_base_file_and_picture(stored, tmp_path, capsys):
    base, tuned = stored
    options = ["--base", base, "--null", "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg")]
    assert __main__.main("spectra", tuned, *options) == 0
    found = spectra.Spectra.from_json(tmp_path / "s.json")
    assert found.rows == spectra.analyze(tuned, base=base, null=1, progress=False).rows
    assert [row.moved for row in found] == [16, 0]
    assert (tmp_path / "s.svg").read_text().count("share of the weights") == 1
    assert "moved" in capsys.readouterr().out


def test_several_models_are_told_apart(stored, tmp_path, capsys):
    assert __main__.main("spectra", *stored, "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"base", "tuned"} <= set(lines)
    found = json.loads((tmp_path / "s.json").read_text())
    assert list(found) == ["base", "tuned"]
    assert found["base"] == json.loads(json.dumps(spectra.analyze(stored[0], progress=False).as_dict()))
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_models_of_one_name_go_by_their_paths(stored, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base").symlink_to(stored[0])
    assert __main__.main("spectra", stored[0], str(tmp_path / "other" / "base")) == 0
    assert {stored[0], str(tmp_path / "other" / "base")} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "the following arguments are required: MODEL"),
        (("{base}", "--nul"), "unrecognized arguments: --nul"),
        (("{base}", "{base}"), "spectra: each MODEL must be named once"),
        (("{base}", "--plot", "picture.txt"), "spectra: a picture's name must end with its format"),
        (("{base}", "--json", "{base}"), "spectra: a file to write must be in a folder that is there"),
        (("{base}", "--plot", "{base}/no/x.png"), "spectra: a file to write must be in a folder that is there"),
        (("{base}/../nothing/at/all",), "must be a file, a folder or the name of a model on the Hub"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, said, stored, capsys):
    assert __main__.main("spectra", *(text.format(base=stored[0]) for text in arguments)) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_help_shows_how(capsys):
    assert __main__.main("spectra", "--help") == 0
    assert "childtune spectra openai-community/gpt2 --null" in capsys.readouterr().out
