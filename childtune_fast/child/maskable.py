"""Which parameters a child network is chosen in: by default the weights of the repeated blocks, found by structure.

The paper masks a transformer's layers and trains embeddings and head in full. The names of layers differ between
families of models ("layer", "h", "block", "layers"). All families keep their layers in a list of modules that contain
modules themselves, and the search relies on that.
"""

import re
from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter

from ..arguments import Selector, check_model, predicate

_LEAST_SHARE = 0.1  # the share of the trainable weights that the found blocks must hold
_HEAD_NAMES = re.compile(  # matches the first or a later part of a name; heads in transformers and in common code
    r"(^|\.)(\w*classifier|classification_head|score|qa_outputs|lm_head|cls|head|heads|fc|logits_proj|"
    r"\w+_predictions|vocab_projector)(\.|$)"
)


def maskable_parameters(model: nn.Module, maskable: Selector = None) -> dict[str, Parameter]:
    """Returns the trainable parameters that a child network is chosen in, by name, each tied one once.

    Args:
        model: the module whose parameters are selected.
        maskable: a predicate over names, or a regular expression that is searched in them; None takes the parameters
            of the repeated blocks (default: None).

    Raises:
        ValueError: no weights are selected, or the repeated blocks hold under a tenth of the trainable weights.
        TypeError: `model` is no module, or `maskable` is neither a string, nor a pattern, nor a function.
    """
    check_model(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if maskable is None:
        blocks = tuple(name + "." for name in block_lists(model))
        chosen = {name: param for name, param in trainable.items() if name.startswith(blocks)}
        if _size(chosen.values()) < _LEAST_SHARE * _size(trainable.values()) or not _size(chosen.values()):
            raise ValueError(_no_blocks(model, chosen, trainable))
        return chosen
    wanted = predicate(maskable, "maskable")
    chosen = {name: param for name, param in trainable.items() if wanted(name)}
    if not _size(chosen.values()):
        raise ValueError(
            f"maskable must match parameters that require gradients (got {maskable!r}, which matches none of the "
            f"{len(trainable)}); the model has {_candidates(model, trainable)}"
        )
    return chosen


def block_lists(model: nn.Module) -> list[str]:
    """Returns the names of the outermost lists of repeated blocks, such as "bert.encoder.layer".

    Such a list is a ModuleList or a Sequential whose members all contain modules with parameters. At least two members
    must be of the same class, except in a ModuleList of one member. Three kinds of lists do not count: a list of whole
    models, which have embeddings and repeated blocks inside; a list with the name of a head; and a list of plain
    perceptrons.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found) or _HEAD_NAMES.search(name)
        if name and not inside and _is_block_list(module) and not _holds_models(module):
            found.append(name)
    return found


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    members = [member for member in module.children() if any(True for _ in member.parameters())]
    if not members or not all(map(_is_composite, members)):
        return False
    if all(isinstance(member, nn.Sequential) and not any(map(_is_composite, member)) for member in members):
        return False  # small perceptrons, as in the heads of a model for several tasks
    if len(members) == 1:
        return isinstance(module, nn.ModuleList)  # a model with one layer, or with one layer that it applies repeatedly
    return len({type(member) for member in members}) < len(members)


def _is_composite(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _holds_models(blocks: nn.Module) -> bool:
    return any(
        any(isinstance(module, nn.Embedding) for module in member.modules())
        and any(_is_block_list(module) for module in member.modules())
        for member in blocks.children()
    )


def head_parameters(model: nn.Module, head: Selector = None) -> dict[str, Parameter]:
    """Returns the trainable parameters of the task head, by name.

    Args:
        model: the module whose parameters are selected.
        head: a predicate over names, or a regular expression that is searched in them; None takes the parameters that a
            transformers model has beside its base model, and in other models those outside the repeated blocks with
            names that heads commonly have (default: None).

    Raises:
        ValueError: no trainable parameter is in the head, or all are.
        TypeError: `model` is no module, or `head` is neither a string, nor a pattern, nor a function.
    """
    check_model(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)  # transformers' attribute
    if head is None and isinstance(base, nn.Module):
        of_base = {id(param) for param in base.parameters()}
        found = {name: param for name, param in trainable.items() if id(param) not in of_base}
    elif head is None:
        blocks = tuple(name + "." for name in block_lists(model))
        found = {n: param for n, param in trainable.items() if _HEAD_NAMES.search(n) and not n.startswith(blocks)}
    else:
        wanted = predicate(head, "head")
        found = {name: param for name, param in trainable.items() if wanted(name)}
    if not found or len(found) == len(trainable):
        raise ValueError(
            f"head_only: a head must be found beside other parameters (got {len(found)} of the {len(trainable)} "
            f"trainable ones); pass head=, a predicate or regex over names; the model has "
            f"{_candidates(model, trainable)}"
        )
    return found


def _no_blocks(model: nn.Module, chosen: dict[str, Parameter], trainable: dict[str, Parameter]) -> str:
    share = _size(chosen.values()) / max(_size(trainable.values()), 1)
    return (
        "maskable=None takes the weights inside the repeated blocks, which must hold at least "
        f"{_LEAST_SHARE:.0%} of the trainable weights (got {share:.1%}, from {block_lists(model) or 'no such list'}); "
        f"pass maskable=, a predicate or regex over names; the model has {_candidates(model, trainable)}"
    )


def _candidates(model: nn.Module, trainable: dict[str, Parameter]) -> str:
    """Returns the names of the largest modules near the root, with their shares of the trainable weights, as text."""
    total = max(_size(trainable.values()), 1)
    shares = {}
    for name, module in model.named_modules():
        if name and name.count(".") <= 2:
            shares[name] = _size(param for param in module.parameters() if param.requires_grad) / total
    largest = sorted(shares, key=lambda name: -shares[name])[:8]
    return ", ".join(f"'{name}' ({shares[name]:.1%})" for name in largest if shares[name]) or "no trainable weights"


def _size(params: Iterable[Parameter]) -> int:
    return sum(param.numel() for param in params)
