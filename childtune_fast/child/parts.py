"""The parts of a model, found by structure: the lists of its repeated blocks, and its heads.

The names of layers differ between families of models ("layer", "h", "block", "layers"). All families keep their layers
in a list of modules of the same kind, and the search relies on that. Heads may have such lists too. They are told by
their place, beside the base model of a transformers model, or by their name.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn import Parameter

from .names import WRAPPED

# Names of heads in transformers and in common code: whole ones, last words, and last words that are heads only in the
# plural and beside other blocks. For a `decoder` is half of many backbones, an `output` a part of most blocks, and a
# `predictor` of speech models and of V-JEPA 2 is as pretrained as their encoder.
_NAMES = {"cls", "fc", "score", "qa_outputs", "logits_proj", "vocab_projector", "class_predictor"}
_NAMES |= {"class_embed", "bbox_embed"}  # of DETR and its descendants
_WORDS = {"head", "classifier", "tagger", "prediction", "regressor", "scorer", "labeler", "labeller"}
_PLURALS = {"decoders", "outputs", "predictors"}
_NO_HEADS = {"conv_head", "norm_head"}  # the last pretrained layers of timm's EfficientNet and MobileNet
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of "task_heads", "taskHeads" and "LMHead2"


class Parts(NamedTuple):
    """The names of what a model consists of, beside its embeddings."""

    blocks: list[str]  # the outermost lists of repeated blocks, such as "bert.encoder.layer"
    heads: list[str]  # the outermost modules and parameters of heads, such as "classifier"


def find_parts(model: nn.Module) -> Parts:
    """Returns the names of the lists of repeated blocks of a model, and of its heads.

    A list of blocks is a ModuleList or a Sequential whose members all contain modules with parameters, or themselves
    hold matrices and are no layers of torch. At least two members must be of the same class, except in a ModuleList of
    one member. Three kinds of lists do not count: a list of whole models, which have embeddings and repeated blocks
    inside; a list of plain perceptrons; and a list in a head, or of heads.

    A head is what a transformers model has beside its base model or backbone, except for another model, and what has
    the name of a head. Inside of a base model, where a pooling or a stem may be called so, a name only keeps a list
    from being one of blocks. What holds all parameters is the model itself, whatever it is called.
    """
    words = zip(*(name.split(".") for name, _ in model.named_parameters()), strict=False)
    shared = [word[0] for word in itertools.takewhile(lambda word: len(set(word)) == 1, words)]
    whole = {".".join(shared[: i + 1]) for i in range(len(shared))}
    parts = _Search(whole, _PLURALS).parts(model)
    return parts if parts.blocks else _Search(whole, set()).parts(model)


def within(name: str, outer: Iterable[str]) -> bool:
    """Returns whether `name` is one of the outer names, or of something inside of what has one."""
    return any(name == other or name.startswith(other + ".") for other in outer)


def has_block_list(module: nn.Module) -> bool:
    """Returns whether a module has a list of repeated blocks inside, or is one."""
    return any(map(_is_block_list, module.modules()))


class _Search:
    """One walk through a model, in the order of its modules."""

    def __init__(self, whole: set[str], plurals: set[str]) -> None:
        """Takes the names of what holds all parameters, and the words that are heads in the plural."""
        self._whole = whole
        self._plurals = plurals
        self._seen: set[nn.Module] = set()  # a module in two places goes by the name of the first, as parameters do
        self._beside: set[Parameter] = set()  # of heads beside base models, which may share them with heads inside
        self._found = Parts([], [])

    def parts(self, model: nn.Module) -> Parts:
        """Returns what is found in `model`; may be called once."""
        self._enter(model, "")
        return self._found

    def _enter(self, module: nn.Module, name: str) -> None:
        """Goes through a module that is in no transformers model, but may be one."""
        base = _base_of(module)
        beside = {key: child for key, child in module.named_children() if key != base and not _is_other(child, module)}
        params = {*module.parameters(recurse=False), *nn.ModuleList(beside.values()).parameters()}
        if base is None or not params:  # as RT-DETR, whose heads are all inside
            return self._walk(module, name, in_model=_is_model(module))
        inside = set(module.get_submodule(base).modules())
        heads = {key: child for key, child in beside.items() if child not in inside}
        self._beside.update(params)
        self._seen.update(heads.values())
        self._found.heads.extend(_joined(name, key) for key in [*module._parameters, *heads])
        return self._walk(module, name, in_model=True, base=base)

    def _walk(
        self, module: nn.Module, name: str, *, in_model: bool, base: str | None = None, in_base: bool = False
    ) -> None:
        """Goes through a module's children; `base` is the one that is a base model."""
        for key in module._parameters:
            if self._is_head(key, name) and not in_base:
                self._found.heads.append(_joined(name, key))
        for key, child in module.named_children():
            if child in self._seen:
                continue
            self._seen.add(child)
            path = _joined(name, key)
            is_list = _is_block_list(child) and not _holds_models(child)
            if self._is_head(key, name) or (is_list and _is_list_of_heads(child)):
                if not in_base or not self._beside.isdisjoint(child.parameters()):
                    self._found.heads.append(path)
            elif is_list:
                self._found.blocks.append(path)
            elif in_model:
                self._walk(child, path, in_model=True, in_base=in_base or key == base)
            else:
                self._enter(child, path)

    def _is_head(self, key: str, holder: str) -> bool:
        """Returns whether what a module called `holder` calls `key` is a head by name."""
        if key in _NO_HEADS or _joined(holder, key) in self._whole:
            return False
        last = _last_word(key)
        plural = last in self._plurals and last != _last_word(holder) + "s"  # "decoder.decoders" are a decoder's layers
        return key in _NAMES or _is_head_word(key) or plural


def _is_model(module: nn.Module) -> bool:
    """Returns whether a module is a model of transformers.

    Wrappers such as PEFT's have the attributes of the model inside of them, so only those of the class count.
    """
    return hasattr(type(module), "base_model_prefix")


def _base_of(module: nn.Module) -> str | None:
    """Returns what a transformers model with a head calls its base model, or else its backbone; None for any other."""
    if not _is_model(module):
        return None
    kind: Any = type(module)
    names = [kind.base_model_prefix]
    if any(re.search("For[A-Z]", of.__name__) for of in kind.__mro__):  # a base model may have a backbone, and a neck
        names.append("backbone")
    inside = {name: base for name in names if (base := module._modules.get(name)) is not None}
    return next((name for name, base in inside.items() if has_block_list(base)), None)


def _is_other(module: nn.Module, model: nn.Module) -> bool:
    """Returns whether a module is another transformers model than the one that holds it, by their configurations."""
    return _is_model(module) and type(getattr(module, "config", None)) is not type(getattr(model, "config", None))


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    members = _members(module)
    if not members or not all(map(_is_block, members)):
        return False
    if all(isinstance(member, nn.Sequential) and not any(map(_is_composite, member)) for member in members):
        return False  # small perceptrons, as in the heads of a model for several tasks
    if len(members) == 1:
        return isinstance(module, nn.ModuleList)  # a model with one layer, or with one layer that it applies repeatedly
    return len(set(map(_kind, members))) < len(members)


def _members(module: nn.Module) -> list[nn.Module]:
    """Returns the modules with parameters that a module consists of, without the wrappers around them."""
    return [_unwrapped(member) for member in module.children() if any(True for _ in member.parameters())]


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns what is inside of the wrappers of torch, and of PEFT's adapters."""
    while (key := next((key for key in (*WRAPPED, "base_layer") if key in module._modules), None)) is not None:
        module = module.get_submodule(key)
    return module


def _is_block(member: nn.Module) -> bool:
    matrices = any(param.ndim > 1 for param in member.parameters(recurse=False))
    return _is_composite(member) or (matrices and not _is_torch_layer(member))


def _is_composite(member: nn.Module) -> bool:
    return any(inner is not member._modules.get("parametrizations") for inner in _members(member))


def _is_torch_layer(module: nn.Module) -> bool:
    """Returns whether a module is a layer of torch, or of a class made from one. A recurrent one may be a block."""
    if isinstance(module, (nn.RNNBase, nn.ParameterList, nn.ParameterDict)):
        return False
    return any(kind.__module__.startswith("torch.nn.modules.") for kind in type(module).__mro__ if kind != nn.Module)


def _kind(member: nn.Module) -> object:
    """Returns the class of a block; a list's, which says nothing, are those of its members."""
    if isinstance(member, (nn.Sequential, nn.ModuleList)):
        return frozenset(map(_kind, _members(member)))
    return type(member)


def _holds_models(blocks: nn.Module) -> bool:
    return any(
        any(isinstance(module, nn.Embedding) for module in member.modules()) and has_block_list(member)
        for member in blocks.children()
    )


def _is_list_of_heads(blocks: nn.Module) -> bool:
    return all(_is_head_word(type(member).__name__) for member in _members(blocks))


def _is_head_word(name: str) -> bool:
    last = _last_word(name)
    return last in _WORDS or last.removesuffix("s") in _WORDS


def _last_word(name: str) -> str:
    return (_WORD.findall(name) or [""])[-1].lower()


def _joined(holder: str, key: str) -> str:
    return f"{holder}.{key}" if holder else key
