"""How a command reads its arguments, runs, and tells what was wrong in a line."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError


def new_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Returns the parser of `childtune COMMAND`, whose help ends with `examples`, a line each."""
    return argparse.ArgumentParser(
        prog=f"childtune {command}".rstrip(),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(parser: argparse.ArgumentParser, arguments: Sequence[str], do: Callable[[argparse.Namespace], None]) -> int:
    """Runs a command with the arguments of the command line.

    Args:
        parser: of `new_parser`.
        arguments: those after the command's name.
        do: what the command does with them.

    Returns:
        0; 2 if an argument is invalid, or what it names cannot be read, written or used; 130 if it was interrupted.
    """
    try:
        options = parser.parse_args(arguments)
    except SystemExit as ended:  # --help, or an argument that it does not know, of which it has told
        return int(ended.code or 0)
    try:
        do(options)
    except ModuleNotFoundError as error:
        return _ended(parser, f"needs the package {error.name}; pip install {error.name}", 2)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        return _ended(parser, str(error), 2)
    except KeyboardInterrupt:
        return _ended(parser, "interrupted", 130)
    return 0


def _ended(parser: argparse.ArgumentParser, why: str, status: int) -> int:
    print(f"{parser.prog.partition(' ')[2]}: {' '.join(why.split())}", file=sys.stderr)
    return status


def positive(text: str) -> int:
    """Returns the whole number above 0 that an argument is."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0 (got {text})")
    return number


def share(text: str) -> float:
    """Returns the number in (0, 1] that an argument is."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1] (got {text})")
    return number


def finite(text: str) -> float:
    """Returns the finite number that an argument is."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number (got {text})")
    return number


def quiet() -> None:
    """Keeps transformers from showing bars, and from warning of new heads, which are meant."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """Names the model in errors of the block that loads it, which transformers' do not all name."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"'{model}' cannot be loaded: {error}") from error


def check_target(path: str) -> None:
    """Raises ValueError unless a file can be made at `path`: at once, and not after minutes of work."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"a file to write must be in a folder that is there (got '{path}')")


def tell(facts: Mapping[str, Any], *, as_json: bool, text: str = "") -> None:
    """Prints facts, {name: value}, as JSON or a line each; as lines, with a text below."""
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        lines = [f"{name:<18}{value}" for name, value in facts.items()]
        print("\n".join([*lines, *([text] if text else [])]))
