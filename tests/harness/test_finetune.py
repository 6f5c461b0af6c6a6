"""The fine-tuning harness: metrics, tasks, and the demo's report."""

import pytest
import torch
from finetune_tasks import write_task

from benchmarks.finetune import data, methods, metrics, report

# Metrics, against values computed by hand


def logits(predictions, classes=2):
    return torch.eye(classes)[torch.tensor(predictions)]


def test_f1_and_accuracy():
    """Of class 1: 2 right of 3 predicted, and 2 found of 3, so F1 = 2/3."""
    targets = torch.tensor([1, 1, 1, 0, 0])
    assert metrics.f1(targets, logits([1, 1, 0, 1, 0])) == pytest.approx({"F1": 2 / 3, "accuracy": 3 / 5})


def test_matthews():
    """(tp * tn - fp * fn) / sqrt of the product of the four sums: (2*1 - 1*1) / sqrt(3*3*2*2)."""
    targets = torch.tensor([1, 1, 1, 0, 0])
    found = metrics.matthews(targets, logits([1, 1, 0, 1, 0]))
    assert found == pytest.approx({"Matthews": 1 / 6, "accuracy": 3 / 5})


def test_accuracy_and_macro_f1():
    """F1 of the classes: 2/3, 2/3 and 0."""
    targets = torch.tensor([0, 0, 1, 2])
    found = metrics.accuracy(targets, logits([0, 1, 1, 0], 3))
    assert found == pytest.approx({"accuracy": 1 / 2, "macro F1": (1 / 2 + 2 / 3 + 0) / 3})


def test_correlation():
    """Of 1, 2, 3 with 1, 3, 2 (ranks alike): 1/2. Constant predictions have none."""
    targets = torch.tensor([1.0, 2.0, 3.0])
    found = metrics.correlation(targets, torch.tensor([[1.0], [3.0], [2.0]]))
    assert found == pytest.approx({"Pearson": 1 / 2, "Spearman": 1 / 2})
    assert metrics.correlation(targets, torch.ones(3, 1)) == {"Pearson": 0.0, "Spearman": 0.0}


def test_roc_auc_counts_labels_that_occur_and_lack():
    """Label 0: of 2 x 1 pairs one in order, so 1/2. Label 1: all in order. Label 2 is always there."""
    targets = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    outputs = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 2.0, 0.0], [-1.0, -2.0, 0.0]])
    assert metrics.roc_auc(targets, outputs)["macro ROC AUC"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("metric", "targets", "expected"),
    [
        ("accuracy", [0, 1, 1, 2], 1 / 2),
        ("f1", [1, 1, 0, 0], 2 / 3),  # all 1
        ("matthews", [1, 1, 0], 0.0),
        ("correlation", [1.0, 2.0], 0.0),
        ("roc_auc", [[0.0], [1.0]], 0.5),
    ],
)
def test_the_best_constant_prediction(metric, targets, expected):
    assert metrics.constant_score(metric, torch.tensor(targets)) == pytest.approx(expected)


# Tasks


@pytest.mark.parametrize(
    ("name", "label", "metric"),
    [
        ("glue/cola", "{}", "matthews"),
        ("glue/mrpc", "{}", "f1"),
        ("glue/rte", "{}", "accuracy"),
        ("glue/stsb", "{}.5", "correlation"),
        ("own/scores", "{}.5", "correlation"),
        ("own/classes", "{}", "accuracy"),
    ],
)
def test_a_task_in_a_folder_has_its_official_metric(tmp_path, name, label, metric):
    write_task(tmp_path, name, [f"a{i}\tb{i}\t{label.format(i % 2)}" for i in range(8)])
    task = data.load_task(name, folder=tmp_path)
    assert (task.metric, len(task.train), len(task.dev), task.aside) == (metric, 8, 8, [])


def test_examples_set_aside_are_a_fifth_of_train_and_not_in_it(tmp_path):
    write_task(tmp_path, "task", [f"a{i}\tb\t{i % 2}" for i in range(100)])
    whole, limited = (data.load_task("task", limit=limit, folder=tmp_path, set_aside=True) for limit in (None, 30))
    assert whole.aside == limited.aside
    assert len(whole.aside) == 20
    assert not set(whole.aside) & set(whole.train)
    assert len(whole.train) == 80
    assert set(limited.train) < set(whole.train)
    assert len(limited.train) == 30


def test_the_docstring_task_with_several_labels():
    task = data.load_task("docstrings-multi:40", limit=50, dev_limit=50)
    packages = data.load_task("docstrings:40").labels
    assert (task.metric, task.labels) == ("roc_auc", packages)
    targets = torch.tensor(task.targets(task.train))
    assert targets.shape == (50, len(packages))
    assert set(targets.sum(1).tolist()) <= {1.0, 2.0}
    assert [sum(row) for row in targets.tolist()] == [1 + ("|" in e.label) for e in task.train]
    assert all(e.sentence2 for e in task.train)


@pytest.mark.parametrize("name", ["docstrings:0", "docstrings:many"])
def test_a_wrong_number_of_paragraphs_is_named(name):
    with pytest.raises(data.UserError, match="how many paragraphs"):
        data.load_task(name)


# The demo's report


def test_the_demos_report_knows_all_methods_and_metrics(tmp_path):
    task = data.load_task("traits", limit=20, dev_limit=20)
    runs = [
        {"method": name, "seed": 0, "curve": [[1, {"macro ROC AUC": 0.5, "macro F1": 0.4}]]} for name in methods.METHODS
    ]
    report.picture(runs, task, "model", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "20 dev examples, over one seed" in report.caveats(runs, task)
    assert "accuracy" not in report.caveats(runs, task)
