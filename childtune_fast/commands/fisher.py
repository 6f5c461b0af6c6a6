"""`childtune fisher`: the Fisher scores of a model of transformers on a data set, to a file that `choose` reads."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..child import files
from ..fisher import estimate_fisher
from . import data
from .running import check_target, naming, new_parser, positive, quiet, run, tell

_EXAMPLES = """  childtune fisher bert-base-uncased train.tsv --text sentence1 sentence2 --out scores.safetensors
  childtune fisher bert-base-uncased nyu-mll/glue --config rte --text sentence1 sentence2 --batches 63
  childtune fisher openai-community/gpt2 texts.jsonl --task causal-lm --text text --per-example
"""
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
    add("data", metavar="DATA", help="file (.tsv, .csv, .jsonl, .parquet, also .gz), or name of a data set on the Hub")
    add("--text", nargs="+", required=True, metavar="COLUMN", help="the text, or the two texts, of an example")
    add("--label", default="label", metavar="COLUMN", help="default: label")
    add("--task", choices=tuple(_CLASSES), default="classification", help="default: classification")
    add("--config", metavar="NAME", help="configuration of a data set on the Hub")
    add("--split", help="split of a data set on the Hub; default: train")
    add("--batch-size", type=positive, default=16, metavar="N", help="default: 16")
    add("--batches", type=positive, metavar="N", help="stops after so many; default: all")
    add("--max-length", type=positive, metavar="N", help="tokens of an example at most; default: 128, or what it reads")
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
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}") from None
    rows = data.read(options)
    model, loader, labels = _prepared(options, rows)
    started = time.perf_counter()
    scores = estimate_fisher(
        model.to(options.device), loader, max_batches=options.batches, per_example=options.per_example
    )
    facts = {
        "model": options.model,
        "architecture": type(model).__name__,
        "num_labels": model.config.num_labels,
        "labels": labels,
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
    tell({**facts, "weights": weights, "seconds": seconds, "file": options.out}, as_json=options.json)


def _prepared(options: argparse.Namespace, rows: Any) -> tuple[Any, DataLoader[Any], dict[str, int] | None]:
    """Returns the model in float32, a loader of its batches, and {label: number of its class}, if there are classes."""
    import transformers

    quiet()
    with naming(options.model):
        config = transformers.AutoConfig.from_pretrained(options.model, trust_remote_code=False)
    classes: data.Classes | None = None
    targets: list[Any] | None = None
    if options.task == "classification":
        classes = data.classes(rows, options.label, config)
        targets = [classes.numbers[label] for label in rows[options.label]]
    elif options.task == "regression":
        targets = data.numbers(rows, options.label)
    size = {} if targets is None else {"num_labels": 1 if classes is None else classes.total}
    if (config.architectures or [""])[0].endswith("ForSequenceClassification") and size.get("num_labels") not in (
        None,
        config.num_labels,
    ):
        print(f"fisher: a new head takes the place of the model's, of {config.num_labels} outputs", file=sys.stderr)
    torch.manual_seed(options.seed)
    with naming(options.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        kind = getattr(transformers, _CLASSES[options.task])
        more = {"ignore_mismatched_sizes": True, **size} if size else {}
        model = kind.from_pretrained(options.model, trust_remote_code=False, **more).float()  # in half, squares are 0
    options.max_length = _length(options.max_length, tokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of '{options.model}' must have a token to pad with, or one that ends texts")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch[column] for column in options.text)
        return dict(tokenizer(*texts, truncation=True, max_length=options.max_length))

    encoded = rows.map(tokens, batched=True, remove_columns=rows.column_names)
    if targets is not None:
        encoded = encoded.add_column("labels", targets)
    collate = (
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if options.task == "causal-lm"
        else transformers.DataCollatorWithPadding(tokenizer)
    )
    loader = DataLoader(encoded.shuffle(seed=options.seed), batch_size=options.batch_size, collate_fn=collate)
    return model, loader, None if classes is None else {str(label): n for label, n in classes.numbers.items()}


def _length(asked: int | None, tokenizer: Any, config: Any) -> int:
    """Returns how many tokens an example may have; raises ValueError if the model has no positions for so many."""
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or sys.maxsize)
    if asked is not None and asked > most:
        raise ValueError(f"--max-length must be {most} at most, which is what the model reads (got {asked})")
    return asked or min(128, most)
