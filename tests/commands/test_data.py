"""The examples of `childtune fisher`: files of every kind, and how labels are numbered."""

import argparse
import gzip
from types import SimpleNamespace

import datasets
import pytest

from childtune_fast.commands import data

NO_HEAD = SimpleNamespace(architectures=["BertModel"], num_labels=2, label2id={"LABEL_0": 0, "LABEL_1": 1})


def head(num_labels, **label2id):
    return SimpleNamespace(
        architectures=["BertForSequenceClassification"], num_labels=num_labels, label2id=label2id or {}
    )


def rows_of(labels, **features):
    rows = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
    return rows.cast_column("label", features["label"]) if features else rows


def numbered(labels, config=NO_HEAD, **features):
    found = data.classes(rows_of(labels, **features), "label", config)
    return found.numbers, found.total


def test_labels_are_numbered():
    assert numbered([2, 0, 1]) == ({0: 0, 1: 1, 2: 2}, 3)
    assert numbered([1, 2, 4]) == ({1: 0, 2: 1, 4: 2}, 3)
    assert numbered([0.0, 1.0]) == ({0: 0, 1: 1}, 2)
    assert numbered([False, True]) == ({False: 0, True: 1}, 2)
    assert numbered(["b", "a"]) == ({"a": 0, "b": 1}, 2)


def test_a_head_keeps_its_numbers():
    assert numbered(["no", "yes"], head(2, yes=0, no=1)) == ({"no": 1, "yes": 0}, 2)
    assert numbered(["no", "yes"], head(3, yes=0, no=1, so=2)) == ({"no": 1, "yes": 0}, 3)
    assert numbered(["no", "maybe"], head(2, yes=0, no=1)) == ({"maybe": 0, "no": 1}, 2)
    assert numbered([0, 2], head(3)) == ({0: 0, 2: 2}, 3)
    assert numbered([0, 3], head(3)) == ({0: 0, 3: 1}, 2)


def test_a_data_set_that_names_its_classes_has_them_all():
    label = datasets.ClassLabel(names=["a", "b", "c"])
    assert numbered([0, 2], label=label) == ({0: 0, 2: 2}, 3)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, -1], "must have a class in every row (got -1, which stands for none)"),
        ([0.5, 1.0], "say --task regression"),
        ([1, 1], "must have two classes or more (got 1 alone)"),
        ([1, None], "column 'label' must have a label in every row (got None in row 2)"),
        ([1.0, float("nan")], "(got nan in row 2)"),
        ([[1], [2]], "(got [1] in row 1)"),
    ],
)
def test_labels_that_are_none(labels, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        data.classes(rows_of(labels), "label", NO_HEAD)
    assert said in str(raised.value)


def read(path, **options):
    words = {"text": ["text"], "label": "label", "task": "classification", "config": None, "split": None, **options}
    return data.read(argparse.Namespace(data=str(path), **words))


FILES = {
    "a.tsv": 'text\tlabel\nNA\tno\nsay "hi" now\tyes\n',
    "A.TSV": 'text\tlabel\nNA\tno\nsay "hi" now\tyes\n',
    "a.csv": 'text,label\nNA,no\n"say ""hi"" now",yes\n',
    "a.jsonl": '{"text": "NA", "label": "no"}\n{"text": "say \\"hi\\" now", "label": "yes"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    (tmp_path / "of.tsv").mkdir()  # whose name says nothing
    path = tmp_path / "of.tsv" / name
    path.write_text(FILES[name])
    with gzip.open(f"{path}.gz", "wt") as file:
        file.write(FILES[name])
    for place in (path, f"{path}.gz"):
        rows = read(place)
        assert (rows["text"][:], rows["label"][:]) == (["NA", 'say "hi" now'], ["no", "yes"])


def test_a_row_without_a_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": null, "label": 0}\n')
    with pytest.raises(ValueError, match=r"column 'text' must have a text in every row \(got None in row 2\)"):
        read(tmp_path / "a.jsonl")
