"""The data of the demo and of the fine-tuning harness: it leaks nothing, and its errors say what to do."""

import gzip
import re
import sys
import types

import pytest

from benchmarks.finetune import data, definitions, docstrings


@pytest.fixture(scope="module")
def splits():
    return docstrings.build()


# The docstring task


def test_a_module_is_in_one_split_only(splits):
    modules = [{paragraph.module for paragraph in part} for part in splits]
    assert all(modules)
    assert not modules[0] & modules[1]


def test_no_paragraph_occurs_twice(splits):
    letters = ["".join(re.findall("[a-z]+", p.text.lower())) for part in splits for p in part]
    assert len(letters) == len(set(letters))


def test_every_package_is_in_both_splits_and_none_dominates(splits):
    train_part, dev = ([p.package for p in part] for part in splits)
    assert set(train_part) == set(dev)
    assert len(set(dev)) >= 8
    assert max(map(train_part.count, set(train_part))) <= docstrings.TRAIN_CAP
    assert max(map(dev.count, set(dev))) <= docstrings.DEV_CAP


def test_answers_are_hidden(splits):
    modules = {part.strip("_") for _, module, _ in docstrings.read_sources() for part in module.split(".")}
    for paragraph in [*splits[0], *splits[1]]:
        words = set(re.findall(r"\w+", paragraph.text))
        assert not [word for word in words if "_" in word or re.search("[a-z][A-Z]", word)], paragraph
        assert not {word.lower() for word in words} & modules, paragraph
        assert not [name for name in docstrings.PACKAGES if name in paragraph.text.lower()], paragraph


def test_the_task_is_deterministic(splits):
    assert docstrings.build() == splits


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Call read() on an HTTPResponse.", "Call X() on an X."),
        ("the asyncio.Future of json.dumps", "the X of X"),
        ("See cookies and http_proxy, e.g. a value.", "See X and X, e.g. a value."),
        ("Read the value, i.e. the first one.", "Read the value, i.e. the first one."),
        ("An emailed message", "An X message"),
        ("", ""),
    ],
)
def test_hiding_of_names(text, seen):
    assert docstrings.hide_names(text, {"cookie"}) == seen


def test_paragraphs_shared_by_packages_are_dropped_and_repeated_ones_kept_once():
    text = "Return the value, or None."
    same = [docstrings.Paragraph(text, "xml", "xml.a"), docstrings.Paragraph(text.upper(), "xml", "xml.b")]
    assert [p.module for p in docstrings.without_duplicates(same)] == ["xml.a"]
    assert docstrings.without_duplicates([*same, docstrings.Paragraph(text, "http", "http.a")]) == []


@pytest.mark.parametrize("name", ["docstrings", "pairs", "traits"])
def test_a_python_without_sources_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: tmp_path)
    with pytest.raises(data.UserError, match="ships no standard library sources"):
        data.load_task(name)


# The tasks of what docstrings document

FUNCTION = """
class Stack:
    @cached
    def pop(self, index=-1):
        if index:
            def inner():
                return 1
        self.size = [x for x in self]
        try:
            return None
        except KeyError:
            raise

def clear():
    pass

def total(*values):
    return values
"""


def test_traits_are_read_off_the_code_of_the_function_alone():
    tree = definitions.ast.parse(FUNCTION)
    found = {node.name: definitions.traits(node, in_class) for node, in_class in definitions.functions(tree)}
    assert found["pop"] == set(definitions.TRAITS) - {"returns"}  # not that of the function inside, and not of None
    assert found["clear"] == set()
    assert found["total"] == {"arguments", "returns"}
    assert found["inner"] == {"returns"}


def modules_by_text():
    """{paragraph: the modules of the standard library in whose docstrings it stands}."""
    found = {}
    for _, module, tree in definitions.read_sources():
        for node in definitions.ast.walk(tree):
            if isinstance(node, (definitions.ast.Module, *docstrings.DEFINITIONS)):
                for text in (docstrings.ast.get_docstring(node) or "").split("\n\n"):
                    found.setdefault(" ".join(text.split()), set()).add(module)
    return found


@pytest.fixture(scope="module")
def pairs():
    return definitions.build_pairs()


def test_half_of_the_pairs_belong_together_and_no_text_is_in_two(pairs):
    for part in pairs:
        answers = [answer for *_, answer in part]
        assert abs(answers.count("same") - answers.count("other")) <= 1
        letters = [docstrings.letters(text) for pair in part for text in pair[:2]]
        assert len(set(letters)) == len(letters)
    assert not {pair[0] for pair in pairs[0]} & {pair[0] for pair in pairs[1]}


def test_pairs_are_of_one_package_only_if_they_belong_together(pairs):
    modules = modules_by_text()
    known = [(modules.get(first, ()), modules.get(second, ()), answer) for first, second, answer in pairs[1]]
    known = [(a, b, answer) for a, b, answer in known if len(a) == len(b) == 1]
    assert len(known) > 200
    for a, b, answer in known:
        assert (a == b) == (answer == "same")
        assert answer == "same" or a.pop().split(".")[0] != b.pop().split(".")[0]


def test_too_few_pairs_are_refused():
    with pytest.raises(data.UserError, match="pairs:7: that is too few; give at least 8"):
        data.load_task("pairs:7")


def test_pairs_may_be_limited():
    task = data.load_task("pairs:30")
    assert len(task.train) == 30
    assert task.counts()["same"][0] == 15
    assert task.dev == data.load_task("pairs").dev


def test_the_task_of_traits():
    task = data.load_task("traits")
    assert (task.metric, task.labels) == ("roc_auc", sorted(definitions.TRAITS))
    assert len(task.train) > 3000
    assert any(example.label == "" for example in task.train)  # a function without any
    assert all(len(row) == 10 for row in task.targets(task.dev))
    texts = [[docstrings.letters(example.sentence1) for example in part] for part in (task.train, task.dev)]
    assert len({*texts[0], *texts[1]}) == len(texts[0]) + len(texts[1])


# Other tasks


def test_tsv_of_pairs_keeps_quotes_and_real_labels(tmp_path):
    path = tmp_path / "train.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('sentence1\tsentence2\tlabel\nA "quote\tb\u2028c\t2.5\nd\te\t3\n')
    task = data.load_task(str(path), dev=str(path))
    assert task.train[0] == data.Example('A "quote', "b\u2028c", "2.5")
    assert task.labels is None
    assert task.targets(task.dev) == [2.5, 3.0]


def test_tsv_without_dev_file_holds_out_equal_inputs_together(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence1\tlabel\n" + "".join(f"text {i % 50}\t{i % 2}\n" for i in range(200)))
    task = data.load_task(str(path))
    sides = [{example.sentence1 for example in part} for part in (task.train, task.dev)]
    assert len(task.train) + len(task.dev) == 200
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9"], ["9", "10"]),
        (["1", "2.5"], None),
        ([str(i) for i in range(data.MAX_CLASSES + 1)], None),
    ],
)
def test_labels_tell_classification_from_regression(labels, expected):
    assert data.infer_labels([data.Example("text", None, label) for label in labels]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("text\tlabel\na\t1\n", "must name columns sentence1 and label"),
        ("sentence1\tlabel\na\t1\nb\n", "line 3 has 1 fields, but the header names 2"),
        ("sentence1\tlabel\na\t1\n", "too few rows"),
    ],
)
def test_a_bad_tsv_is_described(tmp_path, content, message):
    path = tmp_path / "train.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(data.UserError, match=message):
        data.load_task(str(path))


@pytest.mark.parametrize(
    ("label", "strange", "message"),
    [("yes", "no", r"labels that train lacks \(no\)"), ("0.5", "half", r"labels that are no finite numbers \(half\)")],
)
def test_a_label_that_only_dev_has_is_named(tmp_path, label, strange, message):
    for name, text in (("train", label), ("dev", strange)):
        (tmp_path / f"{name}.tsv").write_text(f"sentence1\tlabel\ntext\t{text}\n")
    with pytest.raises(data.UserError, match=message):
        data.load_task(str(tmp_path / "train.tsv"), dev=str(tmp_path / "dev.tsv"))


def test_hub_data_set(monkeypatch):
    rows = [
        {"idx": 0, "premise": "a", "hypothesis": "b", "label": 1},
        {"idx": 1, "premise": "c", "hypothesis": "d", "label": 0},
    ]
    library = types.SimpleNamespace(load_dataset=lambda path, config: {"train": rows, "validation": rows[:1]})
    monkeypatch.setitem(sys.modules, "datasets", library)
    task = data.load_task("owner/name:config")
    assert task.labels == ["0", "1"]
    assert task.dev == [data.Example("a", "b", "1")]


def test_hub_errors_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.UserError, match="pip install datasets"):
        data.load_task("owner/name")

    def unreachable(path, config):
        raise ConnectionError("no route to the hub\ndetails")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(data.UserError, match=r"no route to the hub\); check name, config and network"):
        data.load_task("owner/name")
