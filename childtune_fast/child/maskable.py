"""Which parameters a child network is chosen in: by default the weights of the repeated blocks, without heads.

The paper masks a transformer's layers and trains embeddings and head in full. What these are, parts.py finds.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter

from ..arguments import Selector, check_model, predicate, shown
from .parts import Parts, find_parts, has_block_list, within

_LEAST_SHARE = 0.1  # the share of the trainable weights that the found blocks must hold


def maskable_parameters(model: nn.Module, maskable: Selector = None) -> dict[str, Parameter]:
    """Returns the trainable parameters that a child network is chosen in, by name, each tied one once.

    Args:
        model: the module whose parameters are selected.
        maskable: a predicate over names, or a regular expression that is searched in them; None takes the parameters
            of the repeated blocks, none of which `head_parameters` finds (default: None).

    Raises:
        ValueError: no weights are selected; the repeated blocks hold under a tenth of the trainable weights, or are
            frozen.
        TypeError: `model` is no module, or `maskable` is neither a string, nor a pattern, nor a function.
    """
    check_model(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if maskable is None:
        parts = find_parts(model)
        chosen = {name: param for name, param in trainable.items() if within(name, parts.blocks)}
        if _size(chosen.values()) < _LEAST_SHARE * _size(trainable.values()) or not _size(chosen.values()):
            raise ValueError(_frozen_blocks(model, parts) or _no_blocks(model, parts, chosen, trainable))
        return chosen
    wanted = predicate(maskable, "maskable")
    chosen = {name: param for name, param in trainable.items() if wanted(name)}
    if not _size(chosen.values()):
        raise ValueError(
            f"maskable must match parameters that require gradients (got {shown(maskable)}, which matches none of the "
            f"{len(trainable)}); the model has {_candidates(model, trainable)}"
        )
    return chosen


def head_parameters(model: nn.Module, head: Selector = None) -> dict[str, Parameter]:
    """Returns the trainable parameters of the task head, by name.

    Args:
        model: the module whose parameters are selected.
        head: a predicate over names, or a regular expression that is searched in them; None takes the parameters that a
            transformers model has beside its base model or backbone, and elsewhere those outside the repeated blocks
            with names that heads commonly have (default: None).

    Raises:
        ValueError: no trainable parameter is in the head, or all parameters are.
        TypeError: `model` is no module, or `head` is neither a string, nor a pattern, nor a function.
    """
    check_model(model)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if head is None:
        heads = find_parts(model).heads
        found = {name: param for name, param in trainable.items() if within(name, heads)}
    else:
        wanted = predicate(head, "head")
        found = {name: param for name, param in trainable.items() if wanted(name)}
    if not found or len(found) == sum(1 for _ in model.parameters()):
        raise ValueError(
            f"head_only: a head must be found beside other parameters (got {len(found)} of the {len(trainable)} "
            f"trainable ones); pass head=, a predicate or regex over names; the model has "
            f"{_candidates(model, trainable)}"
        )
    return found


def block_lists(model: nn.Module) -> list[str]:
    """Returns the names of the outermost lists of repeated blocks, such as "bert.encoder.layer"."""
    return find_parts(model).blocks


def _frozen_blocks(model: nn.Module, parts: Parts) -> str | None:
    """Returns the error for blocks that would do if all their weights were trained; None for others."""
    params = dict(model.named_parameters())
    trainable = [name for name, param in params.items() if param.requires_grad]
    of_blocks = [name for name in params if within(name, parts.blocks)]
    whole = _size(params[name] for name in of_blocks)
    frozen = _size(params[name] for name in of_blocks if not params[name].requires_grad)
    if not frozen or whole < _LEAST_SHARE * _size(params[name] for name in {*of_blocks, *trainable}):
        return None
    remedies = ["unfreeze them with requires_grad_(True)"]
    if trainable:
        remedies.append("pass maskable=, a predicate or regex over names, to choose among the trainable weights")
    if any(within(name, parts.heads) for name in trainable):
        remedies.append("train the head alone with ChildNetwork.head_only")
    return (
        f"maskable=None takes the weights inside the repeated blocks {parts.blocks}, which must not be frozen (got "
        f"{frozen:,} of their {whole:,} weights without requires_grad); {', or '.join(remedies)}"
    )


def _no_blocks(model: nn.Module, parts: Parts, chosen: dict[str, Parameter], trainable: dict[str, Parameter]) -> str:
    share = _size(chosen.values()) / max(_size(trainable.values()), 1)
    modules = dict(model.named_modules())
    heads = [name for name in parts.heads if name in modules and has_block_list(modules[name])]
    return (
        "maskable=None takes the weights inside the repeated blocks, which must hold at least "
        f"{_LEAST_SHARE:.0%} of the trainable weights (got {share:.1%}, from {parts.blocks or 'no such list'}"
        f"{f', with {heads} taken for heads' if heads else ''}); "
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
