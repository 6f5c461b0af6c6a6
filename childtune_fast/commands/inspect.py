"""`childtune inspect`: what a file of ours holds: a child network, a delta, or Fisher scores."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ..child import delta_entries, files
from ..child.report import summarize
from ..ops.packed_mask import PackedMask, fingerprint
from .running import new_parser, run, tell

_EXAMPLES = """  childtune inspect child.safetensors
  childtune inspect delta.safetensors --json
"""


def main(arguments: Sequence[str]) -> int:
    """Prints what a file holds, once its digest has been checked; returns 0, or 2 if it is damaged or another."""
    parser = new_parser(
        "inspect",
        "What a child network's file, a delta, or a file of Fisher scores holds; it is read whole, and its digest "
        "compared.",
        _EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", help="file of a child network, a delta or scores, or a delta's folder")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    return run(parser, arguments, _inspect)


def _inspect(options: argparse.Namespace) -> None:
    if os.path.isdir(options.file):  # as `childtune delta make` writes it
        options.file = os.path.join(options.file, "delta.safetensors")
    kind = files.kind_in(options.file)
    facts: dict[str, Any] = {"file": kind, "bytes": os.path.getsize(options.file)}
    if kind == files.SCORES:
        scores, about = files.read_scores(options.file)
        facts |= {**about, "weights": sum(score.numel() for score in scores.values())}
        sums = {name: float(score.double().sum()) for name, score in scores.items()}
        text = "\n".join(f"{name:<60}{total:>12.4g}" for name, total in sums.items())
        tell({**facts, "sums": sums} if options.json else facts, as_json=options.json, text=f"\nsum by tensor\n{text}")
        return
    of_kind, masks = _child(options.file) if kind == files.CHILD else _delta(options.file)
    summary = summarize(masks)
    rows = [{"name": row.name, "kept": row.count, "weights": row.numel} for row in summary.tensors]
    facts |= {**of_kind, **({"tensors": rows} if options.json else {})}
    tell(facts, as_json=options.json, text=f"\n{summary}")


def _child(path: str) -> tuple[dict[str, Any], dict[str, PackedMask]]:
    """Returns the facts of a child network's file, and its masks."""
    contents, description = files.read(path, files.CHILD)
    shapes = files.shapes_in(path, description)
    masks = {name: files.mask_in(path, name, shape, contents[name]) for name, shape in shapes.items()}
    return {"fingerprint": fingerprint(masks.values())}, masks


def _delta(path: str) -> tuple[dict[str, Any], dict[str, PackedMask]]:
    """Returns the facts of a delta, and the masks in it."""
    contents, description = files.read(path, files.DELTA)
    found = delta_entries.entries(path, files.shapes_in(path, description), contents, description)
    masks = {name: entry.mask for name, entry in found.items() if entry.mask is not None}
    full = [name for name, entry in found.items() if entry.full is not None]
    facts = {"masked tensors": len(masks), "in full": ", ".join(full) or "none"}
    return {**facts, "as in the base": len(found) - len(masks) - len(full)}, masks
