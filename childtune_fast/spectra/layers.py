"""Which layers a model has, and which matrices each of them is: out of its modules, or out of names in a file."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..arguments import is_sharded, lost_memory
from ..child.names import plain_name
from ..ops.tensor_parts import kind_of

MIN_EVALS, MAX_EVALS = 8, 15_000  # eigenvalues of a layer, by weightwatcher's defaults
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")
_EMBEDDING = re.compile(r"(.*_)?(embed|embeddings?)|embed_(tokens|positions|in)|w[tp]e|shared|relative_attention_bias")
_INDICES = (torch.int64, torch.bool)  # of buffers, such as positions and masks; never weights
_FUSED = "c_attn"  # GPT-2's query, key and value
_PARTS = {2: ("k", "v"), 3: ("q", "k", "v")}

Cut = Callable[[Tensor], Sequence[Tensor]]


class Layer(NamedTuple):
    """A layer whose eigenvalues are taken.

    Attributes:
        longname: name of its module, without what wrappers put into it; with a further part where a module has several.
        layer_type: "dense", "conv1d", "conv2d" or "embedding", weightwatcher's word.
        parameter: name of the parameter that it is in.
        cut: function from that parameter, or a tensor of its shape, to the layer's matrices.
        shape: shape of each matrix.
        slices: number of matrices.
    """

    longname: str
    layer_type: str
    parameter: str
    cut: Cut
    shape: tuple[int, int]
    slices: int = 1


class Source(NamedTuple):
    """Where layers are, and what is not among them.

    Attributes:
        layers: the layers, in the model's order.
        skipped: {name: reason} of what has two dimensions or more, and is left out.
        shapes: {name of a parameter: shape} of all parameters.
        read: function from a parameter's name to its values.
    """

    layers: list[Layer]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def _whole(tensor: Tensor) -> list[Tensor]:
    """Cuts a matrix into itself."""
    return [tensor]


def _part(index: int, parts: int, dim: int) -> Cut:
    return lambda tensor: [tensor.chunk(parts, dim)[index]]


def _at(index: int) -> Cut:
    return lambda tensor: [tensor[index]]


def _slices(kernel: Tensor) -> list[Tensor]:
    """Cuts a convolution's kernel [out, in, height, width] into a matrix [out, in] for each place."""
    return list(kernel.flatten(2).unbind(2))


def layers_in(name: str, shape: tuple[int, ...], layer_type: str, split_fused: bool) -> list[Layer] | str:
    """Returns the layers that a parameter holds, or the reason why it holds none.

    Args:
        name: the parameter's name.
        shape: its shape, of two dimensions or more.
        layer_type: one of weightwatcher's, "experts" for stacked ones, or the reason for which it is left out.
        split_fused: whether query, key and value in one Conv1D are layers of their own.
    """
    longname = _longname(name)
    *_, module, last = ("", *plain_name(name).split("."))
    if layer_type == "conv2d":
        found = [Layer(longname, layer_type, name, _slices, (shape[0], shape[1]), shape[2] * shape[3])]
    elif layer_type == "experts":
        found = [Layer(f"{longname}.{i}", "dense", name, _at(i), (shape[1], shape[2])) for i in range(shape[0])]
    elif layer_type not in ("dense", "conv1d", "embedding"):
        return layer_type
    elif last == "in_proj_weight":
        third = (shape[0] // 3, shape[1])
        stem = longname.removesuffix("_weight")
        found = [Layer(f"{stem}.{p}", layer_type, name, _part(i, 3, 0), third) for i, p in enumerate(_PARTS[3])]
    elif split_fused and module == _FUSED and layer_type == "conv1d" and shape[1] // shape[0] in _PARTS:
        names = _PARTS[shape[1] // shape[0]]
        found = [
            Layer(f"{longname}.{p}", layer_type, name, _part(i, len(names), 1), (shape[0], shape[0]))
            for i, p in enumerate(names)
        ]
    else:
        found = [Layer(longname, layer_type, name, _whole, (shape[0], shape[1]))]
    count = min(found[0].shape) * found[0].slices if found else 0
    if count < MIN_EVALS:
        return f"{count} eigenvalues, which are fewer than {MIN_EVALS}"
    if count > MAX_EVALS:
        return f"{count} eigenvalues, which are more than {MAX_EVALS}"
    return found


def _longname(parameter: str) -> str:
    """Returns a layer's name out of its parameter's, in wrappers or not."""
    return plain_name(parameter).removesuffix(".weight")


# ---- Out of modules ------------------------------------------------------------------------------------------------


def of_module(model: nn.Module, split_fused: bool) -> Source:
    """Returns the layers of a model, in the order of its modules; a tied one goes by the name that it has first."""
    found = Source([], {}, {}, dict(model.named_parameters(remove_duplicate=False)).__getitem__)
    seen: dict[object, str] = {}
    for path, module in model.named_modules():
        if opaque := _opaque(module):
            found.skipped[_longname(f"{path}.weight")] = opaque
        for last, param in module.named_parameters(recurse=False):
            name = f"{path}.{last}" if path else last
            reason = _unreadable(param)
            if not reason:
                found.shapes[name] = tuple(param.shape)
            if not (is_lazy(param) or param.numel() == 0 or param.ndim >= 2):
                continue  # a bias, or the weight of a normalisation
            if not reason:
                first = seen.setdefault((param.device, param.data_ptr(), param.shape), name)
                reason = f"tied to {_longname(first)}" if first != name else _type_in_module(module, last, param)
            _add(found, name, reason, split_fused)
    return found


def _add(found: Source, name: str, layer_type: str, split_fused: bool) -> None:
    """Adds the layers in a parameter, or the reason why there are none."""
    layers = layers_in(name, found.shapes[name], layer_type, split_fused) if name in found.shapes else layer_type
    if isinstance(layers, str):
        found.skipped[_longname(name)] = layers
    else:
        found.layers.extend(layers)


def _opaque(module: nn.Module) -> str:
    """Returns why a module that has weights, but not as parameters, is left out; "" for any other module."""
    # Asked of the class: of a module, `weight` may be computed, and change what it is computed from.
    if callable(getattr(type(module), "weight", None)) or "qweight" in module._buffers:
        return f"quantised ({type(module).__name__})"
    return ""


def _unreadable(param: Tensor) -> str:
    """Returns why a parameter's values cannot be had; "" if they can."""
    if is_sharded(param):
        return "sharded over ranks (DTensor); analyze the saved model"
    if kind := kind_of(param):
        return {
            "meta": "on the meta device, without values",
            "uninitialized": "not initialized before the first forward pass",
        }.get(kind, f"its values are not dense ({kind})")
    if lost_memory(param) or param.numel() == 0:
        return "its values are elsewhere: it is empty, or its memory was freed"
    if param.is_complex():
        return "complex"
    if not param.is_floating_point() or param.itemsize < 2:
        return f"quantised ({param.dtype})"
    return ""


def _type_in_module(module: nn.Module, last: str, param: Tensor) -> str:
    """Returns the layer type of a module's parameter of two dimensions or more, or why it is left out."""
    kind = type(module).__name__
    if isinstance(module, ParametrizationList):
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"recurrent ({kind})"
    if param.ndim == 2 and (last == "weight" or isinstance(module, nn.MultiheadAttention)):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "embedding"
        return "conv1d" if kind == "Conv1D" else "dense"  # transformers' Conv1D, a Linear with its weight transposed
    if isinstance(module, nn.Conv2d) and last == "weight":
        return "conv2d"
    if param.ndim == 3 and "expert" in kind.lower():
        return "experts"
    return f"of no known kind ({last} of {kind}, {param.ndim} dimensions)"


# ---- Out of names in files -----------------------------------------------------------------------------------------


def of_tensors(
    forms: Mapping[str, tuple[tuple[int, ...], str]], read: Callable[[str], Tensor], split_fused: bool
) -> Source:
    """Returns the layers among tensors of which names and shapes are known.

    Args:
        forms: {name: (shape, "" or the reason why its values are not taken)}.
        read: function from a tensor's name to its values.
        split_fused: as `layers_in` has it.
    """
    found = Source([], {}, {name: shape for name, (shape, reason) in forms.items() if not reason}, read)
    transposed = {name.split(".")[-2] for name in found.shapes if _is_transposed(name, found.shapes)}
    for name, (shape, reason) in forms.items():
        if len(shape) >= 2:
            _add(found, name, reason or _type_by_name(name, shape, transposed), split_fused)
    return found


def of_state_dict(tensors: Mapping[Any, Any], split_fused: bool) -> Source:
    """Returns the layers in a state dict; of tensors with the same memory, the first counts."""
    forms: dict[str, tuple[tuple[int, ...], str]] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype in _INDICES:
            continue
        reason = _unreadable(tensor)
        if not reason:
            first = seen.setdefault((tensor.device, tensor.data_ptr(), tensor.shape), name)
            reason = f"tied to {_longname(first)}" if first != name and tensor.ndim >= 2 else ""
        forms[name] = () if is_lazy(tensor) else tuple(tensor.shape), reason
    return of_tensors(forms, tensors.__getitem__, split_fused)


def _is_transposed(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Returns whether a bias shows that a weight is [inputs, outputs], as that of transformers' Conv1D is."""
    shape, bias = shapes[name], shapes.get(f"{name.removesuffix('.weight')}.bias")
    return name.endswith(".weight") and len(shape) == 2 and bias == shape[1:] and shape[0] != shape[1]


def _type_by_name(name: str, shape: tuple[int, ...], transposed: set[str]) -> str:
    """Returns the layer type that a tensor's name and shape tell, or why it is left out."""
    *_, module, last = ("", *name.split("."))
    if _RECURRENT.fullmatch(last):
        return "recurrent"
    if len(shape) == 2 and last in ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if _EMBEDDING.fullmatch(module):
            return "embedding"
        return "conv1d" if module in transposed else "dense"
    if len(shape) == 4 and last == "weight":
        return "conv2d"
    if len(shape) == 3 and "expert" in name:
        return "experts"
    return f"of no known kind ({last}, {len(shape)} dimensions)"
