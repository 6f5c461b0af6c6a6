"""`childtune inspect`: what a file of a child network, or a delta, holds."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..ops.packed_mask import fingerprint
from . import delta_entries, files
from .report import Summary, summarize

_EXAMPLES = """examples:
  childtune inspect child.safetensors
  childtune inspect delta.safetensors --json
"""


def main(arguments: Sequence[str]) -> int:
    """Prints what the file that the command line names holds, once its digest has been checked.

    Args:
        arguments: those of the command line, after "inspect".

    Returns:
        0; 2 if an argument is invalid, or the file is damaged or of another kind.
    """
    parser = argparse.ArgumentParser(
        prog="childtune inspect",
        description="What a child network's file, or a delta, holds; it is read whole, and its digest compared.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="what ChildNetwork.save or save_delta wrote")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as ended:  # --help, or an argument that it does not know, of which it has told
        return int(ended.code or 0)
    try:
        facts, summary = look(options.file)
    except (ValueError, OSError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 2
    if options.json:
        rows = [{"name": row.name, "kept": row.count, "weights": row.numel} for row in summary.tensors]
        print(json.dumps({**facts, "tensors": rows}, indent=1))
    else:
        print("\n".join([*(f"{name:<18}{value}" for name, value in facts.items()), "", str(summary)]))
    return 0


def look(path: str) -> tuple[dict[str, Any], Summary]:
    """Returns the facts of a file, {name: number or text}, and the summary of its masks.

    Raises:
        ValueError: the file is damaged, or of another kind.
        OSError: the file cannot be read.
    """
    kind = files.kind_in(path)
    contents, description = files.read(path, kind)
    shapes = files.shapes_in(path, description)
    facts: dict[str, Any] = {"file": kind, "bytes": os.path.getsize(path)}
    if kind == files.CHILD:
        masks = {name: files.mask_in(path, name, shape, contents[name]) for name, shape in shapes.items()}
        return {**facts, "fingerprint": fingerprint(masks.values())}, summarize(masks)
    found = delta_entries.entries(path, shapes, contents, description)
    masks = {name: entry.mask for name, entry in found.items() if entry.mask is not None}
    full = [name for name, entry in found.items() if entry.full is not None]
    facts |= {"masked tensors": len(masks), "in full": ", ".join(full) or "none"}
    return {**facts, "as in the base": len(found) - len(masks) - len(full)}, summarize(masks)
