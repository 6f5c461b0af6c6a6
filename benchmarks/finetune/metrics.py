"""What tasks are scored by: GLUE's official metrics and, elsewhere, what fits the labels, from scikit-learn and scipy.

Every function takes targets and the model's raw outputs and returns {name: score}; tables lead with the first, and the
choice of a learning rate goes by it.
"""

from statistics import mean

import torch

NO_RELATION = 0.0  # a correlation with constant predictions


def accuracy(targets, outputs):
    """Accuracy and macro F1 of a classification."""
    from sklearn.metrics import f1_score

    targets, predictions = targets.tolist(), outputs.argmax(-1).tolist()
    share = mean(float(t == p) for t, p in zip(targets, predictions, strict=True))
    return {"accuracy": share, "macro F1": float(f1_score(targets, predictions, average="macro", zero_division=0))}


def f1(targets, outputs):
    """F1 of class 1, and accuracy: MRPC and QQP."""
    from sklearn.metrics import f1_score

    predictions = outputs.argmax(-1)
    score = f1_score(targets.tolist(), predictions.tolist(), zero_division=0)
    return {"F1": float(score), "accuracy": (targets == predictions).double().mean().item()}


def matthews(targets, outputs):
    """Matthews correlation, and accuracy: CoLA."""
    from sklearn.metrics import matthews_corrcoef

    predictions = outputs.argmax(-1)
    score = matthews_corrcoef(targets.tolist(), predictions.tolist())
    return {"Matthews": float(score), "accuracy": (targets == predictions).double().mean().item()}


def correlation(targets, outputs):
    """Pearson's and Spearman's correlation of a regression: STS-B."""
    from scipy.stats import pearsonr, spearmanr

    targets, predictions = targets.tolist(), outputs.squeeze(-1).tolist()
    if max(predictions) == min(predictions):
        return {"Pearson": NO_RELATION, "Spearman": NO_RELATION}
    return {
        "Pearson": float(pearsonr(targets, predictions).statistic),
        "Spearman": float(spearmanr(targets, predictions).statistic),
    }


def roc_auc(targets, outputs):
    """Mean area under the ROC curve over labels that occur and lack, and macro F1: several labels an example."""
    from sklearn.metrics import f1_score, roc_auc_score

    told_apart = (targets.min(0).values == 0) & (targets.max(0).values == 1)
    area = roc_auc_score(targets[:, told_apart].numpy(), outputs[:, told_apart].numpy(), average="macro")
    score = f1_score(targets.numpy(), (outputs > 0).numpy(), average="macro", zero_division=0)
    return {"macro ROC AUC": float(area), "macro F1": float(score)}


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "correlation": correlation, "roc_auc": roc_auc}
OF_GLUE = {
    "cola": "matthews",
    "mrpc": "f1",
    "qqp": "f1",
    "quora": "f1",
    "stsb": "correlation",
    "sick_rel": "correlation",
}


def constant_score(metric, targets):
    """Returns what the best prediction that is the same for all examples scores, by the metric's first number.

    Args:
        metric: a key of `METRICS`.
        targets: tensor of the examples' targets.
    """
    if metric in ("correlation", "matthews"):
        return 0.0
    if metric == "roc_auc":
        return 0.5
    classes = int(targets.max().item()) + 1
    constant = (torch.eye(classes)[c].expand(len(targets), -1) for c in range(classes))
    return max(next(iter(METRICS[metric](targets, outputs).values())) for outputs in constant)
