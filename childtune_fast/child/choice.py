"""How a child network is chosen by scores, what is required of the scores, and random ones for an ablation."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..arguments import Selector, check_seed, check_type, is_sharded, lost_memory, shown
from ..ops.packed_mask import PackedMask, pack
from ..ops.select import top_k
from .adapters import warn_of_adapters
from .maskable import maskable_parameters
from .names import renamed
from .zero_scores import check_zero_scores

Scope = Literal["global", "tensor"]  # Among which weights the share is kept.
_CHUNK = 1 << 18  # random scores of a sharded parameter that are drawn at once; even, as the generator draws two


def choose(scores: dict[str, Tensor], reserve_p: float, scope: Scope, *, largest: bool = True) -> dict[str, PackedMask]:
    """Returns the masks of exactly the share `reserve_p` of all weights, or of each tensor's weights.

    Args:
        scores: {parameter name: tensor of the parameter's shape, float32, bfloat16 or float16}, whole or a DTensor.
        reserve_p: share of the weights to choose, in (0, 1].
        scope: "global" chooses among all weights together, "tensor" chooses the share in each tensor.
        largest: whether the highest scores are chosen, or else the lowest (default: True).

    Raises:
        ValueError: `reserve_p` or `scope` is out of its range, a score is NaN, or no weight would be chosen.
        TypeError: `reserve_p` is no number, or a score has another dtype.
    """
    if isinstance(reserve_p, bool) or not isinstance(reserve_p, (int, float)):
        raise TypeError(f"reserve_p must be a float in (0, 1] (got {type(reserve_p).__name__})")
    if not 0 < reserve_p <= 1:
        raise ValueError(f"reserve_p, the share of weights in the child network, must lie in (0, 1] (got {reserve_p})")
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'global' or 'tensor' (got {shown(scope)})")
    groups: Iterable[dict[str, Tensor]] = [scores] if scope == "global" else ({n: t} for n, t in scores.items())
    packed: dict[str, PackedMask] = {}
    for group in groups:
        packed |= top_k(group, round(reserve_p * sum(t.numel() for t in group.values())), largest=largest)
    if not any(mask.count for mask in packed.values()):
        raise ValueError(f"reserve_p={reserve_p} with scope='{scope}' keeps none of the maskable weights; raise it")
    return packed


def choose_by_scores(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    reserve_p: float,
    scope: Scope,
    maskable: Selector,
    *,
    largest: bool,
) -> dict[str, PackedMask]:
    """Returns the masks that `choose` makes for the maskable parameters of a model, with a check of scores and choice.

    Raises:
        ValueError: see `choose`, `checked_scores` and `check_zero_scores`.
        TypeError: see `choose` and `checked_scores`.
    """
    params = maskable_parameters(model, maskable)
    if maskable is None:
        warn_of_adapters(model, params)
    scores = checked_scores(scores, params, model)
    packed = choose(scores, reserve_p, scope, largest=largest)
    check_zero_scores(scores, packed, scope == "tensor", largest=largest)
    return packed


def choose_at_random(
    model: nn.Module, reserve_p: float, seed: int, scope: Scope, maskable: Selector
) -> dict[str, PackedMask]:
    """Returns the masks that `choose` makes for the maskable parameters of a model by random scores."""
    params = maskable_parameters(model, maskable)
    if maskable is None:
        warn_of_adapters(model, params)
    return choose(random_scores(params, seed), reserve_p, scope)


def checked_scores(
    scores: Mapping[str, Tensor], params: Mapping[str, Parameter], model: nn.Module
) -> dict[str, Tensor]:
    """Returns the scores of `params`, the maskable parameters of `model`, by their names in it.

    Raises:
        ValueError: one of the maskable parameters has no score, or a score fits no parameter.
        TypeError: a score is no tensor of a known dtype, or `scores` is no mapping.
    """
    scores = checked_tensors(
        "scores", scores, dict(model.named_parameters()), (torch.float32, torch.bfloat16, torch.float16)
    )
    missing = [name for name in params if name not in scores]
    if missing:
        raise ValueError(
            f"scores must be given for every maskable parameter (got none for {len(missing)} of {len(params)}, the "
            f"first '{missing[0]}'); estimate them for this model, or exclude those parameters with maskable="
        )
    return {name: scores[name] for name in params}


def checked_tensors(
    what: str, tensors: Mapping[str, Tensor], params: Mapping[str, Parameter], dtypes: tuple[torch.dtype, ...]
) -> dict[str, Tensor]:
    """Returns tensors by the names of the parameters that they are for, which wrappers may have changed.

    Args:
        what: the argument's name, with which the error begins.
        tensors: {parameter name: tensor}, the argument to check.
        params: {parameter name: parameter}; tensors for only some of them are enough.
        dtypes: the allowed dtypes of the tensors.

    Raises:
        ValueError: a name or a shape differs, or a DTensor holds partial sums.
        TypeError: `tensors` is no mapping, or a value is no tensor of an allowed dtype.
    """
    check_type(what, tensors, Mapping, "a mapping from parameter names to tensors")
    tensors = renamed(tensors, params)
    for name, tensor in tensors.items():
        if name not in params:
            raise ValueError(
                f"{what} must be for parameters of the model (got '{name}', which model.named_parameters() does not "
                "have; a tied parameter goes by its first name)"
            )
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{what} must be tensors of {allowed} (got {got} for '{name}'); convert them with .to()")
        if tensor.shape != params[name].shape:
            raise ValueError(
                f"{what} must have the parameter's shape (got {tuple(tensor.shape)} for '{name}' of shape "
                f"{tuple(params[name].shape)}); they are of another model"
            )
        if lost_memory(tensor):
            raise ValueError(f"{what} must have memory for their values (got one whose storage was freed for '{name}')")
        if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(
                f"{what} must be whole, sharded or replicated (got partial sums, {tuple(tensor.placements)}, for "
                f"'{name}'); give them other placements with .redistribute()"
            )
    return tensors


def packed_mask(mask: Tensor) -> PackedMask:
    """Returns the mask that a bool tensor holds; for a DTensor, all ranks must come here, and get the whole one."""
    if not is_sharded(mask):
        return PackedMask.pack(mask)
    from ..ops.select_on_ranks import whole_mask
    from ..ops.shards import local_tensor

    return whole_mask(pack(local_tensor(mask).detach()), mask)


def random_scores(params: Mapping[str, Parameter], seed: int) -> dict[str, Tensor]:
    """Returns a float32 score for each weight, 24 random bits that float32 holds exactly; DTensors for DTensors.

    They come from numpy's raw Philox stream, which numpy promises to keep the same in every version. A sharded
    parameter's are those of the whole one; a rank draws them all, and keeps its own.
    """
    generator = np.random.Philox(key=check_seed(seed))
    return {name: _random_scores(param, generator) for name, param in params.items()}


def _random_scores(param: Parameter, generator: "np.random.Philox") -> Tensor:
    if not is_sharded(param):
        return _random_floats(param.numel(), generator).view(param.shape)
    from ..ops.shards import dtensor_like, local_part

    part = local_part(param)
    scores = torch.empty(math.prod(part.shape), device="cpu")
    for first in range(0, param.numel(), _CHUNK):
        floats = _random_floats(min(_CHUNK, param.numel() - first), generator)
        low, high = part.position(first), part.position(first + _CHUNK)
        if low < high:
            scores[low:high] = floats[part.flat_indices(torch.arange(low, high, device="cpu")) - first]
    return dtensor_like(scores.view(part.shape), param)


def _random_floats(count: int, generator: "np.random.Philox") -> Tensor:
    words = generator.random_raw(-(-count // 2)).view(np.uint32)[:count] >> 8
    return torch.from_numpy(words.astype(np.float32))
