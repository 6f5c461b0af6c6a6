"""docs/commands.md: its commands, in order, and its code, with a small base of the name that it uses."""

import re
import shlex
import shutil

from hub_stand_in import put_in_place
from pages import DOCS, run
from saved_models import assert_same, load, save_base, tuned
from trainer_runs import D, make_data, make_trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from childtune_fast import __main__
from childtune_fast.integrations import hub


def lines_of(page):
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_base("bert-base-uncased")
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + "w3 w4\tw5\t0\nw6\tw7 w8\t1\n" * 9)
    done = []
    for words in lines_of("commands.md"):
        if words[0] == "cp":
            model, _ = tuned("bert-base-uncased", child="child.safetensors", num_labels=2)
            model.save_pretrained("my-model")
            shutil.copy(*words[1:])
        else:
            assert words[0] == "childtune"
            if words[2] == "merge":
                shutil.copytree("my-delta", "other-delta")
            assert __main__.main(*words[1:]) == 0, capsys.readouterr().err
            done.append(words[1])
    assert done == ["fisher", "choose", "delta", "inspect", "delta", "delta"]
    assert_same(AutoModelForSequenceClassification.from_pretrained("again"), model)
    assert (tmp_path / "density.png").stat().st_size > 1000


def test_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_base(tmp_path / "base")
    put_in_place(tmp_path / "hub", monkeypatch, folder)
    base = load(folder)
    trained = make_trainer(tmp_path / "out", D, base, eval_dataset=make_data())
    trained.train()
    names = run("commands.md", "Deltas on the Hub", trainer=trained, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert_same(names["model"], trained.model)
    card = (tmp_path / "my-delta" / "README.md").read_text()
    assert "| mode | D |" in card
    assert "| eval_loss |" in card
    child = hub.child_from_pretrained("my-delta", names["model"])
    assert child.fingerprint == trained.child_network.fingerprint
