"""Child-Tuning in transformers' Trainer: `python -m examples.trainer`, or with `--mode D`. Needs no network."""

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from benchmarks.finetune import data, model
from childtune_fast.integrations.transformers import ChildTuningConfig, ChildTuningTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--mode", choices=["F", "D"], default="F")
parser.add_argument("--task", default="docstrings", help="docstrings (default), or a TSV file: sentence1, label")
parser.add_argument("--limit", type=int, default=800, help="examples in train, and in dev (default: %(default)s)")
parser.add_argument("--out", default="trainer-results", help="folder for checkpoints (default: %(default)s)")
options = parser.parse_args()

task, folder = data.load_task(options.task, limit=options.limit, dev_limit=options.limit), model.packaged_model()
tokenizer = AutoTokenizer.from_pretrained(folder)


def encoded(examples):
    """Returns a data set as Trainer takes it: a list of mappings, padded by its collator."""
    inputs = [tokenizer(e.sentence1, truncation=True, max_length=64) for e in examples]
    return [{**tokens, "labels": target} for tokens, target in zip(inputs, task.targets(examples), strict=True)]


trainer = ChildTuningTrainer(
    model_init=lambda: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels)),
    args=TrainingArguments(options.out, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=5e-4),
    train_dataset=encoded(task.train),
    eval_dataset=encoded(task.dev),
    processing_class=tokenizer,
    compute_metrics=lambda scored: {"accuracy": (scored.predictions.argmax(-1) == scored.label_ids).mean().item()},
    child_tuning=ChildTuningConfig(mode=options.mode, reserve_p=0.3),
)
trainer.train()
print(trainer.evaluate())
