"""What a trained model is worth elsewhere: on other data sets of its task, and its encoder on other tasks.

Both are measured after a run of the report, as the paper does (Xu, Luo et al., EMNLP 2021): with `--domains` the model
is scored on the dev sets of other data sets; with `--heads-on` the encoder is frozen and a new linear head is trained
on another task.
"""

import re

import torch

from . import model as models
from .metrics import METRICS
from .sources import UserError
from .train import Experiment, predict

SECOND_CLASS_FIRST = ("qqp", "quora")  # 1 is a duplicate there, as 0 is an entailment in the others


def is_turned(name):
    """Tells whether a task's class 1 is what others call class 0."""
    return re.split("[/:]", name)[-1] in SECOND_CLASS_FIRST


def check_domains(tasks):
    """Raises UserError unless all tasks are classifications. That their classes mean the same, nobody can check."""
    for one in tasks:
        if one.labels is None or one.metric == "roc_auc":
            raise UserError(f"{one.name}: --domains is for classifications with one label; leave this task out")


def on_domains(experiment, model, tokenizer, others):
    """Scores a trained model on the dev sets of other tasks.

    Where two tasks differ in the number of classes, both are taken as the first class against all others: entailment,
    say; a duplicate counts as one.

    Args:
        experiment: the `Experiment` of the run.
        model: what it trained.
        tokenizer: of the model.
        others: {name: `Task`}.

    Returns:
        {name: {metric: score}}.
    """
    pooling = experiment.settings.pooling
    whole = models.Classifier(experiment.backbone, model, pooling) if isinstance(model, models.Head) else model
    scores = {}
    for name, task in others.items():
        inputs = models.TokenInputs(tokenizer, task.dev, experiment.settings.max_length, experiment.device)
        outputs, targets = predict(whole, inputs).cpu(), torch.tensor(task.targets(task.dev))
        if len(task.labels) != outputs.shape[1]:
            outputs = torch.stack([outputs[:, 0], outputs[:, 1:].logsumexp(1)], dim=1)
            targets = targets.clamp(max=1)
        if is_turned(name) != is_turned(experiment.task.name):
            targets = 1 - targets
        scores[name] = METRICS["accuracy"](targets, outputs)
    return scores


def heads_on(experiment, model, tokenizer, others, seed):
    """Trains a head on each of other tasks, on the frozen encoder of a trained model.

    Args:
        experiment: the `Experiment` of the run.
        model: what it trained.
        tokenizer: of the model.
        others: {name: `Task`}.
        seed: of head and data order.

    Returns:
        {name: {metric: score}}, at the learning rate `settings.head_lr`.
    """
    backbone = experiment.backbone if isinstance(model, models.Head) else model.encoder.backbone
    scores = {}
    for name, task in others.items():
        elsewhere = Experiment(tokenizer, backbone, task, experiment.settings, experiment.device)
        scores[name] = elsewhere.run("frozen", seed)["curve"][-1][1]
    return scores
