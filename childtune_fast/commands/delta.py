"""`childtune delta`: what fine-tuning changed, as a small folder: made, applied, merged onto one base."""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import predicate
from ..child import ChildNetwork, TaskVector
from ..integrations.config import CHILD_FILE
from .running import finite, naming, new_parser, quiet, run, tell

_EXAMPLES = """  childtune delta make my-model/ --base bert-base-uncased --out my-delta/
  childtune delta apply my-delta/ --out my-model/
  childtune delta merge rte-delta/ mrpc-delta/ --weights 0.5 0.5 --out merged/
  childtune inspect my-delta/delta.safetensors
"""


def main(arguments: Sequence[str]) -> int:
    """Makes, applies or merges deltas of models of transformers; returns 0, or 2 if what is named is wrong."""
    parser = new_parser("delta", "What fine-tuning changed, of models of transformers, as folders.", _EXAMPLES)
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    make = commands.add_parser("make", help="of a fine-tuned model and its base")
    make.add_argument("model", metavar="MODEL", help="folder of the fine-tuned model")
    make.add_argument("--base", required=True, metavar="BASE", help="the model before: folder, or name on the Hub")
    make.add_argument("--child", metavar="FILE", help="its child network; default: child.safetensors in MODEL")
    apply = commands.add_parser("apply", help="turns the base into the fine-tuned model, bit for bit")
    apply.add_argument("delta", metavar="DELTA", help="folder that `make` wrote, or its name on the Hub")
    merge = commands.add_parser("merge", help="adds what several changed to their base (task vectors)")
    merge.add_argument("deltas", nargs="+", metavar="DELTA", help="folders, or names on the Hub, of one base")
    merge.add_argument("--weights", nargs="+", type=finite, metavar="W", help="of each; default: 1 by their number")
    merge.add_argument("--without", metavar="REGEX", help="leaves out parameters, such as heads, by their names")
    for action in (apply, merge):
        action.add_argument("--base", metavar="BASE", help="default: the one that is noted in DELTA")
    for action in (make, apply, merge):
        action.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
        action.add_argument("--json", action="store_true", help="prints one JSON object")
    return run(parser, arguments, _act)


def _act(options: argparse.Namespace) -> None:
    quiet()
    {"make": _make, "apply": _apply, "merge": _merge}[options.action](options)


def _make(options: argparse.Namespace) -> None:
    from ..integrations import hub, stored

    with naming(options.model):
        model = stored.load_tuned(options.model)
    child = ChildNetwork.load(options.child or os.path.join(options.model, CHILD_FILE), model)
    hub.save_pretrained(options.out, model, child, base=options.base, tokenizer=stored.tokenizer_in(options.model))
    tell({"base": options.base, **_sizes(options.out)}, as_json=options.json)


def _apply(options: argparse.Namespace) -> None:
    from ..integrations import hub, stored

    model = hub.from_pretrained(options.delta, base=options.base)
    model.save_pretrained(options.out)
    if tokenizer := stored.tokenizer_in(options.delta):
        tokenizer.save_pretrained(options.out)
    hub.child_from_pretrained(options.delta, model).save(os.path.join(options.out, CHILD_FILE))
    tell(_sizes(options.out), as_json=options.json)


def _merge(options: argparse.Namespace) -> None:
    from ..integrations import hub, stored

    weights = options.weights or [1 / len(options.deltas)] * len(options.deltas)
    if len(weights) != len(options.deltas):
        raise ValueError(f"--weights must be as many as deltas (got {len(weights)} for {len(options.deltas)})")
    folders = [hub.folder_of(name) for name in options.deltas]
    base, missing = hub.base_of(folders, options.base)
    inner: Any = base.base_model
    start = "" if inner is base else f"{base.base_model_prefix}."
    body = {f"{start}{name}" for name, _ in inner.named_parameters()}
    if lost := sorted(missing & body):  # drawn at random, which --without would leave
        raise ValueError(f"the base must have '{lost[0]}', of the shape that it has in '{options.deltas[0]}'")
    leave = predicate(options.without or "$^", "--without")
    unwanted = {*missing, *filter(leave, dict(base.named_parameters()))}
    vectors = [TaskVector.from_delta(f / hub.DELTA_FILE, base, without=unwanted.__contains__) for f in folders]
    left_out = unwanted.union(*(vector.left_out for vector in vectors))  # by all, since one of them has to
    for vector in vectors:
        vector.changes = {name: change for name, change in vector.changes.items() if name not in left_out}
    if lost := [name for name in sorted(left_out & body) if not leave(name)]:
        raise ValueError(f"every model must have '{lost[0]}', of the base's shape; or leave it out by --without")
    cosines = {
        f"cosine {i + 1}, {j + 1}": round(a.cosine(b), 4) if a.count and b.count else None
        for (i, a), (j, b) in itertools.combinations(enumerate(vectors), 2)
    }
    merged = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        merged = merged + vector * weight
    merged.apply(base)
    whole: Any = base if left_out <= body else inner  # without a head that is not everywhere the same
    whole.save_pretrained(options.out)
    if tokenizer := stored.tokenizer_in(options.deltas[0]):
        tokenizer.save_pretrained(options.out)
    facts = {"class": type(whole).__name__, **cosines, "left out": ", ".join(sorted(left_out))}
    tell({**facts, **_sizes(options.out)}, as_json=options.json)


def _sizes(folder: str) -> dict[str, Any]:
    """Returns {name of a safetensors file in a folder: its bytes}."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.safetensors"))}
