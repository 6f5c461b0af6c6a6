"""`childtune fisher`: the Fisher scores of a model of transformers on a data set, to a file that `choose` reads."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..child import files
from ..fisher import estimate_fisher
from .running import check_target, naming, new_parser, run, tell

_EXAMPLES = """  childtune fisher bert-base-uncased train.tsv --text sentence1 sentence2 --out scores.safetensors
  childtune fisher bert-base-uncased nyu-mll/glue --config rte --text sentence1 sentence2 --batches 63
  childtune fisher openai-community/gpt2 texts.jsonl --task causal-lm --text text --per-example
"""
_READERS = {".tsv": "csv", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


def main(arguments: Sequence[str]) -> int:
    """Estimates the scores that the command line asks for; returns 0, or 2 if something that it names is wrong."""
    parser = new_parser(
        "fisher",
        "Fisher scores of a model on a data set, whose gradients come from the task's loss; needs transformers and "
        "datasets. A head that the model does not have is drawn at random by --seed.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, or name on the Hub")
    add("data", metavar="DATA", help="file (.tsv, .csv, .jsonl, .parquet), or name of a data set on the Hub")
    add("--text", nargs="+", required=True, metavar="COLUMN", help="the text, or the two texts, of an example")
    add("--label", default="label", metavar="COLUMN", help="default: label")
    add("--task", choices=tuple(_CLASSES), default="classification", help="default: classification")
    add("--config", metavar="NAME", help="configuration of the data set on the Hub")
    add("--split", default="train", help="default: train")
    add("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    add("--batches", type=int, metavar="N", help="stops after so many; default: all")
    add("--max-length", type=int, default=128, metavar="N", help="tokens of an example at most; default: 128")
    add("--per-example", action="store_true", help="squares each example's gradient, as in the paper's formula")
    add("--seed", type=int, default=0, metavar="N", help="of a new head and of the examples' order; default: 0")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if there is one")
    add("--out", default="scores.safetensors", metavar="FILE", help="default: scores.safetensors")
    add("--json", action="store_true", help="prints one JSON object")
    return run(parser, arguments, _estimate)


def _estimate(options: argparse.Namespace) -> None:
    check_target(options.out)
    if len(options.text) > 2 or (len(options.text) > 1 and options.task == "causal-lm"):
        raise ValueError(f"--text takes one column, or two of pairs (got {len(options.text)})")
    examples, labels = read(options)
    torch.manual_seed(options.seed)
    model, loader = _prepared(options, examples, labels)
    started = time.perf_counter()
    scores = estimate_fisher(
        model.to(options.device), loader, max_batches=options.batches, per_example=options.per_example
    )
    facts = {
        "model": options.model,
        "architecture": type(model).__name__,
        "num_labels": getattr(model.config, "num_labels", None),
        "data": " ".join(filter(None, [options.data, options.config, options.split])),
        "task": options.task,
        "batches": min(len(loader), options.batches or len(loader)),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "per_example": options.per_example,
        "seed": options.seed,
    }
    files.write(options.out, files.SCORES, scores, facts)
    seconds = round(time.perf_counter() - started, 1)
    weights = sum(score.numel() for score in scores.values())
    tell(
        {**facts, "weights": weights, "seconds": seconds, "file": options.out},
        as_json=options.json,
    )


def read(options: argparse.Namespace) -> tuple[Any, list[Any] | None]:
    """Returns the examples, shuffled by the seed, and what their labels may be, in order; None where they are numbers.

    Raises:
        ValueError: a column is not there, or a label is missing.
        OSError: the data cannot be read.
        ImportError: datasets is not installed.
    """
    import datasets

    datasets.disable_progress_bars()
    reader = next((kind for end, kind in _READERS.items() if options.data.removesuffix(".gz").endswith(end)), None)
    try:
        if reader is None:
            examples = datasets.load_dataset(options.data, options.config, split=options.split)
        else:
            words = {"delimiter": "\t", "quoting": 3} if ".tsv" in options.data else {}
            examples = datasets.load_dataset(reader, data_files=options.data, split="train", **words)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"'{options.data}' cannot be read as a data set: {error.__cause__ or error}") from error
    wanted = [*options.text, *([] if options.task == "causal-lm" else [options.label])]
    if missing := [column for column in wanted if column not in examples.column_names]:
        raise ValueError(f"the data must have the columns asked for (got no '{missing[0]}' in {examples.column_names})")
    examples = examples.select_columns(wanted).shuffle(seed=options.seed)
    if options.task != "classification":
        return examples, None
    values = sorted(set(examples[options.label]), key=lambda value: (isinstance(value, str), value))
    if None in values or len(values) < 2:
        raise ValueError(f"labels of '{options.label}' must be of two classes or more (got {values[:9]})")
    return examples, values


def _prepared(options: argparse.Namespace, examples: Any, labels: list[Any] | None) -> tuple[Any, DataLoader[Any]]:
    """Returns the model and a loader of its batches."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it would warn of a new head, which is meant
    transformers.utils.logging.disable_progress_bar()
    size = {"classification": {"num_labels": len(labels or ())}, "regression": {"num_labels": 1}}.get(options.task, {})
    if size:
        size["ignore_mismatched_sizes"] = True
    kind = getattr(transformers, _CLASSES[options.task])
    with naming(options.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = kind.from_pretrained(options.model, **size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    number = {label: index for index, label in enumerate(labels or ())}

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = dict(tokenizer(*(batch[c] for c in options.text), truncation=True, max_length=options.max_length))
        if options.task == "classification":
            encoded["labels"] = [number[label] for label in batch[options.label]]
        elif options.task == "regression":
            encoded["labels"] = [float(label) for label in batch[options.label]]
        return encoded

    encoded = examples.map(tokens, batched=True, remove_columns=examples.column_names)
    collate = (
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if options.task == "causal-lm"
        else transformers.DataCollatorWithPadding(tokenizer)
    )
    return model, DataLoader(encoded, batch_size=options.batch_size, collate_fn=collate)
