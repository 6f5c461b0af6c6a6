"""`analyze`: from a model to the spectra of its layers."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import FilePath, brief, check_type
from ..child import ChildNetwork
from ..ops.packed_mask import PackedMask
from .layers import Layer, Source, of_module, of_state_dict
from .names import matched
from .row import beside_base, differing, measure
from .stored import opened
from .table import Spectra

Model = nn.Module | Mapping[str, Tensor] | FilePath


def analyze(
    model: Model,
    *,
    base: Model | None = None,
    child: ChildNetwork | None = None,
    null: int = 0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    split_fused: bool = False,
    progress: bool = True,
) -> Spectra:
    """Returns the spectra of a model's layers: what their weights say of how well they are trained, without data.

    For each layer, a power law is fitted to the largest eigenvalues of W^T W (Martin, Peng and Mahoney, "Predicting
    trends in the quality of state-of-the-art neural networks without access to training or testing data", Nature
    Communications 12, 2021). The numbers are those of the package weightwatcher. docs/spectra.md says how to read them.

    The model, its gradients, its mode and the random states are left as they are. Memory is taken for one layer at a
    time: for its Gram matrix, [M, M] in `dtype`, twice; with `null`, for a copy of its weights in float32; with `base`,
    for one in `dtype`. A layer whose rank is not full takes its weights in float64 three times.

    Layers are the matrices in Linear, transformers' Conv1D, Embedding and MultiheadAttention, Conv2d, and each of a
    stack of experts. Other parameters with two dimensions or more are in `Spectra.skipped`, with the reason.

    Args:
        model: torch.nn.Module; its state dict; or a stored model, of which one tensor at a time is read: a safetensors
            file, a folder with such files, or the name of a model on the Hub. Out of modules, the types of layers
            are read off the names of tensors.
        base: the model before fine-tuning, in any of these forms; with it, rows also say what was added to it. Its
            parameters are found by their names; whatever wraps either model, and a prefix that only one of them has,
            make no difference.
        child: the child network that was trained, of the model or of one that it is a part of; with it, rows say its
            density, and with `base`, `Spectra.check` that nothing else moved.
        null: how many times each layer's weights are put into random order. The eigenvalues of that are what the
            layer would have if it had learned nothing but the size of its weights (default: 0).
        seed: of the random orders; a layer's depend on this and its name alone (default: 0).
        dtype: float64 or float32, in which eigenvalues are computed. float32 is about twice as fast; it changes alpha
            in the fifth digit, or more where a power law goes on below some 1e-5 of the largest eigenvalue (default:
            float64 on the CPU, float32 elsewhere).
        split_fused: takes query, key and value in GPT-2's `c_attn` as layers of their own. weightwatcher does not
            (default: False).
        progress: shows a progress bar on stderr, from the third second on (default: True).

    Raises:
        ValueError: an argument is out of its range; a stored model cannot be found or read; base and model have no
            parameter in common, or names fit several parts of one of them; the child network is of another model.
        TypeError: an argument is of another type.
        OSError: a file cannot be read.
    """
    _check(null, seed, dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        source = stack.enter_context(_opened("model", model, split_fused))
        before = None if base is None else stack.enter_context(_opened("base", base, split_fused))
        names = {} if before is None else matched(source.shapes, before.shapes)
        if before is not None and not names:
            raise ValueError("analyze: base must have parameters of the model's names (got none that both have)")
        masks = _masks(source, child)
        rows = []
        for parameter, layers in _shown(source, progress):
            weights = source.read(parameter)
            weights = weights.detach().cpu() if weights.is_mps else weights.detach()  # torch computes none on MPS
            mask = masks[parameter].unpack() if parameter in masks else None
            origin = None
            if before and parameter in names and before.shapes[names[parameter]] == source.shapes[parameter]:
                origin = before.read(names[parameter]).detach()
            for layer in layers:
                cut = layer.cut(weights)
                chosen = dtype or (torch.float64 if weights.device.type == "cpu" else torch.float32)
                row = measure(layer, cut, chosen, null, seed)
                if origin is not None:
                    row = beside_base(row, cut, layer.cut(origin), chosen)
                if mask is not None:
                    inside = sum(int(part.sum()) for part in layer.cut(mask))
                    row = dataclasses.replace(row, child_density=inside / row.numel)
                rows.append(row)
        outside = None if before is None or child is None else _outside(source, before, names, masks)
        return Spectra(rows, source.skipped, outside)


def _check(null: int, seed: int, dtype: torch.dtype | None) -> None:
    for name, value, noun in (("null", null, "a number of shuffles"), ("seed", seed, "an integer")):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"analyze: {name} must be {noun}, 0 or more (got {brief(value)})")
    if dtype not in (None, torch.float64, torch.float32):
        raise ValueError(f"analyze: dtype must be torch.float64, torch.float32 or None (got {dtype})")


@contextlib.contextmanager
def _opened(what: str, model: Any, split_fused: bool) -> Iterator[Source]:
    """Yields the layers of a model in any form; raises TypeError, with the argument's name `what`, if it is none."""
    if isinstance(model, nn.Module):
        yield of_module(model, split_fused)
    elif isinstance(model, Mapping):
        yield of_state_dict(model, split_fused)
    else:
        check_type(f"analyze: {what}", model, (str, os.PathLike), "a torch.nn.Module, a state dict, a path or a name")
        with opened(model, split_fused) as source:
            yield source


def _shown(source: Source, progress: bool) -> Iterator[tuple[str, list[Layer]]]:
    """Yields parameters with their layers, under a progress bar if that takes long."""
    from tqdm import tqdm

    with tqdm(total=len(source.layers), unit="layer", delay=2, leave=False, disable=not progress) as bar:
        for parameter, group in itertools.groupby(source.layers, lambda layer: layer.parameter):
            layers = list(group)
            yield parameter, layers
            bar.update(len(layers))


def _masks(source: Source, child: ChildNetwork | None) -> dict[str, PackedMask]:
    """Returns {name of a parameter: its mask}; raises ValueError if the model lacks one of a child network's."""
    if child is None:
        return {}
    check_type("analyze: child", child, ChildNetwork, "a ChildNetwork or None")
    names = matched(child.packed, source.shapes)
    masks = {names.get(name, name): mask for name, mask in child.packed.items()}
    for name, mask in masks.items():
        if source.shapes.get(name) != mask.shape:
            got = f"shape {source.shapes[name]}" if name in source.shapes else "no such parameter"
            raise ValueError(f"analyze: child must be of the same model: it masks '{name}', {mask.shape} (got {got})")
    return masks


def _outside(
    source: Source, before: Source, names: Mapping[str, str], masks: Mapping[str, PackedMask]
) -> dict[str, int]:
    """Returns {masked parameter: number of weights outside the child network that differ from the base's}."""
    found = {}
    for name, mask in masks.items():
        if name not in names or before.shapes[names[name]] != mask.shape:
            raise ValueError(f"analyze: base must have '{name}', which the child network masks, in shape {mask.shape}")
        now, origin = source.read(name).detach(), before.read(names[name]).detach()
        moved = differing(now, origin.to(now.device)) & ~mask.unpack().to(now.device)
        found[name] = int(moved.sum())
    return found
