"""Which parameters a child network is chosen in: by default the weights of the repeated blocks, found by structure.

The paper masks a transformer's layers and trains embeddings and head in full. Names of layers differ from family to
family ("layer", "h", "block", "layers"); that they are a list of modules which have modules themselves does not.
"""

import re
from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter

from ..arguments import Selector, check_model, predicate

_LEAST_SHARE = 0.1  # of the trainable weights, that the blocks found must hold
_HEAD_NAMES = re.compile(  # first or any later part of a name, in transformers and in common code
    r"(^|\.)(\w*classifier|classification_head|score|qa_outputs|lm_head|cls|head|heads|fc|logits_proj|"
    r"\w+_predictions|vocab_projector)(\.|$)"
)


def maskable_parameters(model: nn.Module, maskable: Selector = None) -> dict[str, Parameter]:
    """Returns the trainable parameters that a child network is chosen in, by name, each tied one once.

    Args:
        model: any module.
        maskable: a predicate or a regex (`re.search`) over parameter names; None takes the repeated blocks.

    Raises:
        ValueError: nothing is left, or the repeated blocks hold under a tenth of the trainable weights.
        TypeError: `maskable` is of another kind.
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

    Such a list is a ModuleList, or a Sequential of several, whose members have modules with parameters themselves, and
    of which two are of one class. A list of whole models, with embeddings and repeated blocks inside, is none; nor is a
    list with a head's name, or of plain perceptrons.
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
        return False  # small perceptrons, as heads for several tasks are
    if len(members) == 1:
        return isinstance(module, nn.ModuleList)  # a model of one layer, or one layer that is used again and again
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
        model: any module.
        head: a predicate or a regex (`re.search`) over parameter names; None takes what a transformers model has beside
            its base model, else names that heads commonly have, outside the repeated blocks.

    Raises:
        ValueError: nothing is found, or nothing else is left.
        TypeError: `head` is of another kind.
    """
    check_model(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)  # as transformers names it
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
    """The largest modules near the root, with their shares of the trainable weights."""
    total = max(_size(trainable.values()), 1)
    shares = {}
    for name, module in model.named_modules():
        if name and name.count(".") <= 2:
            shares[name] = _size(param for param in module.parameters() if param.requires_grad) / total
    largest = sorted(shares, key=lambda name: -shares[name])[:8]
    return ", ".join(f"'{name}' ({shares[name]:.1%})" for name in largest if shares[name]) or "no trainable weights"


def _size(params: Iterable[Parameter]) -> int:
    return sum(param.numel() for param in params)
