"""`childtune choose`: the child network of a model by scores in a file, as a file, a table and a picture."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..child import ChildNetwork, files
from ..spectra.pictures import check_picture, new_figure, saved
from .running import check_target, naming, new_parser, quiet, run, share, tell

_EXAMPLES = """  childtune choose bert-base-uncased scores.safetensors --reserve-p 0.3 --out child.safetensors
  childtune choose my-model/ scores.safetensors --reserve-p 0.1 --scope tensor --plot density.png
"""


def main(arguments: Sequence[str]) -> int:
    """Chooses the child network that the command line asks for; returns 0, or 2 if what it names is wrong."""
    parser = new_parser(
        "choose",
        "The child network of the weights with the highest scores; needs transformers. The model's weights are not "
        "read, only its configuration.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, or name on the Hub")
    add("scores", metavar="SCORES", help="what `childtune fisher` wrote, or a safetensors file of scores by name")
    add("--reserve-p", type=share, required=True, metavar="P", help="share of the maskable weights, in (0, 1]")
    add("--scope", choices=("global", "tensor"), default="global", help="among which weights; default: global")
    add("--maskable", metavar="REGEX", help="searched in parameter names; default: repeated blocks")
    add("--lowest", action="store_true", help="the lowest scores: the paper's ablation")
    add("--out", default="child.safetensors", metavar="FILE", help="default: child.safetensors")
    add("--plot", metavar="F.png", help="draws the density by layer; needs matplotlib")
    add("--json", action="store_true", help="prints one JSON object")
    return run(parser, arguments, _choose)


def _choose(options: argparse.Namespace) -> None:
    for path in filter(None, (options.out, options.plot)):
        check_target(path)
    if options.plot:
        check_picture(options.plot)
    scores, about = files.read_scores(options.scores)
    model = skeleton(options.model, about)
    make = ChildNetwork.lowest if options.lowest else ChildNetwork.from_scores
    child = make(model, scores, reserve_p=options.reserve_p, scope=options.scope, maskable=options.maskable)
    child.save(options.out)
    if options.plot:
        figure = new_figure(6.4, 4.8)
        child.plot(figure.add_subplot())
        saved(figure, options.plot)
    summary = child.summary()
    facts: dict[str, Any] = {"model": options.model, "scores": options.scores, "file": options.out}
    facts |= {"fingerprint": child.fingerprint, "kept": summary.total.count, "weights": summary.total.numel}
    tell(facts, as_json=options.json, text=f"\n{summary}")


def skeleton(name: str, about: dict[str, Any]) -> nn.Module:
    """Returns a model of transformers of a name's configuration, whose weights have no values yet.

    Args:
        name: folder, or name on the Hub.
        about: what the file of scores says of its model, `architecture` and `num_labels`; else the configuration does.

    Raises:
        ValueError: there is no class of that name in transformers.
        OSError: there is no such model.
    """
    import transformers

    from ..integrations.stored import class_of

    quiet()
    size = {} if about.get("num_labels") is None else {"num_labels": about["num_labels"]}
    with naming(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **size)
    kind = class_of(config, about.get("architecture"))
    with torch.device("meta"):
        model: Any = kind(config)
    model.to_empty(device="cpu")  # memory that is never touched, and so never taken
    model.tie_weights()
    return model
