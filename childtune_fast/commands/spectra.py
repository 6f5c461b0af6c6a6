"""`childtune spectra`: the spectra of stored models, as tables, a file and a picture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..spectra.analysis import analyze
from ..spectra.pictures import check_picture, plot_alpha
from ..spectra.table import Spectra
from ..whole_file import written
from .running import check_target, new_parser, run

_EXAMPLES = """  childtune spectra openai-community/gpt2 --null
  childtune spectra my-model/ --base bert-base-uncased --plot moved.png
  childtune spectra openai-community/openai-gpt openai-community/gpt2 --plot overlay.svg
"""


def main(arguments: Sequence[str]) -> int:
    """Prints the spectra of the models that the command line names; returns 0, or 2 if one cannot be read."""
    parser = new_parser(
        "spectra",
        "Was a model trained on enough, layer by layer? docs/spectra.md says how to read the table.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="safetensors file, folder with such files, or name on the Hub")
    add("--base", metavar="M", help="the model before fine-tuning: adds what was moved, and how far")
    add("--null", action="store_true", help="compares each layer with its own weights in random order")
    add("--json", metavar="F", help="writes all columns to a file; of several models, by name")
    add("--plot", metavar="F.png", help="draws one model by layer, or several laid over each other")
    return run(parser, arguments, _analyze)


def _analyze(options: argparse.Namespace) -> None:
    if options.plot:
        check_picture(options.plot)
    for path in filter(None, (options.plot, options.json)):  # not after minutes of work
        check_target(path)
    found: dict[str, Spectra] = {}
    for name, model in zip(_names(options.models), options.models, strict=True):
        found[name] = analyze(model, base=options.base, null=int(options.null))
        heading = [f"\n{name}"] if len(options.models) > 1 else []
        skipped = [f"  skipped {what}: {why}" for what, why in found[name].skipped.items()]
        print("\n".join([*heading, str(found[name]), *skipped]), flush=True)
    if options.json:
        if len(found) == 1:
            next(iter(found.values())).to_json(options.json)
        else:
            with written(options.json) as file:
                text = json.dumps({name: of_one.as_dict() for name, of_one in found.items()}, indent=1)
                file.write(f"{text}\n".encode())
    if options.plot:
        if len(found) == 1:
            next(iter(found.values())).plot(options.plot)
        else:
            plot_alpha(found, options.plot)


def _names(models: Sequence[str]) -> list[str]:
    """Returns a short name for each model: the last part of its path, if these differ."""
    short = [Path(model).name or model for model in models]
    names = short if len(set(short)) == len(short) else list(models)
    if len(set(names)) < len(names):
        raise ValueError("each MODEL must be named once")
    return names
