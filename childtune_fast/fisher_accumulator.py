"""FisherAccumulator: running sums of squared gradients, one float32 tensor for each parameter."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _gpu, fallback
from . import backend as backends
from .checks import check_model, check_type
from .collect import is_sharded
from .selector import Selector, predicate


class FisherAccumulator:
    """The diagonal of the empirical Fisher information, for those who own their training loop.

    Call `update()` after the backward passes whose summed gradient is to be squared; `scores()` is the weighted mean of
    the squares so far. Gradients are only read.

        fisher = FisherAccumulator(model)
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch).backward()
            fisher.update()
        child = ChildNetwork.from_scores(model, fisher.scores(), reserve_p=0.3)

    Scored are the parameters that require a gradient now; tied ones once, by their first name. How exact the sums are:
    docs/numerics.md.

    Args:
        model: whose parameters' gradients are squared.
        grad_clip: scales the gradient of each tensor, on its own, by `min(1, grad_clip / (norm + 1e-6))`, as the
            published code does; None does not clip (default: None).
        parameters: which to score, by name: a predicate, or a regular expression that is searched; None for all
            (default: None).
        offload: "cpu" keeps the sums in the CPU's memory and squares there, for models whose scores do not fit beside
            them on a GPU: each gradient is copied. None keeps them on the parameters' devices (default: None).

    Raises:
        ValueError: `grad_clip` is not above 0, `offload` is another word, no parameter is left, or one is sharded (a
            DTensor).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        grad_clip: float | None = None,
        parameters: Selector = None,
        offload: str | None = None,
    ) -> None:
        if grad_clip is not None and not (isinstance(grad_clip, (int, float)) and grad_clip > 0):
            raise ValueError(
                f"grad_clip must be a number above 0, or None for no clipping (got {grad_clip!r}); with 0, every score "
                "would be 0 and select nothing"
            )
        if offload not in (None, "cpu"):
            raise ValueError(f"offload must be 'cpu', or None to keep scores on their devices (got {offload!r})")
        self.grad_clip = grad_clip
        self._offload = offload
        self._params = _selected(model, parameters)
        for param in self._params.values():  # a build, or why there is none, comes now and not amid a backward pass
            backends.resolve("auto") if offload or param.is_cpu else _gpu.kernels_for(param)
        self._sums: dict[str, Tensor] = {}
        self.reset()

    @torch.inference_mode(False)  # sums made in inference mode could not be written outside of it
    def reset(self) -> None:
        """Begins anew: as if nothing had been accumulated."""
        self._sums = {
            name: torch.zeros(param.shape, dtype=torch.float32, device=self._offload or param.device)
            for name, param in self._params.items()
        }
        self._weight = 0.0
        self._damaged = False

    @torch.no_grad()
    def update(self, *, weight: float = 1.0, grad_scale: float = 1.0) -> None:
        """Adds the squares of the present gradients. A parameter whose `grad` is None adds 0.

        Args:
            weight: of these squares in the mean (default: 1).
            grad_scale: what the loss was multiplied by, such as `scaler.get_scale()`: gradients are divided by it
                before they are clipped and squared (default: 1).

        Raises:
            ValueError: an argument is not above 0 or not finite, no parameter has a gradient, or a gradient is not
                finite. In the last case the sums hold a part of it: `scores()` raises until `reset()`.
        """
        for name, value in (("weight", weight), ("grad_scale", grad_scale)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"FisherAccumulator.update: {name} must be above 0 and finite (got {value!r})")
        self._check_usable("update")
        grads = {name: param.grad for name, param in self._params.items() if param.grad is not None}
        if not grads:
            raise ValueError(
                "FisherAccumulator.update: no parameter has a gradient; call it after backward() and before zero_grad()"
            )
        finite = {name: self._add(name, grad, weight, 1.0 / grad_scale) for name, grad in grads.items()}
        self._close(finite, weight, "FisherAccumulator.update: ")

    def scores(self) -> dict[str, Tensor]:
        """Returns {parameter name: mean of its squared gradient}, new float32 tensors of the parameters' shapes.

        Raises:
            ValueError: nothing has been accumulated, or a gradient was not finite.
        """
        self._check_usable("scores")
        if self._weight == 0:
            raise ValueError("FisherAccumulator.scores: nothing has been accumulated yet; call update() first")
        return {name: _mean(sums.clone(), self._weight) for name, sums in self._sums.items()}

    @torch.no_grad()
    def merge(self, other: "FisherAccumulator") -> None:
        """Adds what `other` has accumulated, over another part of the data.

        Raises:
            ValueError: `other` scores other parameters, clips otherwise, or either holds a gradient that was not
                finite. Nothing has been added then.
        """
        check_type("FisherAccumulator.merge: other", other, FisherAccumulator, "a FisherAccumulator")
        self._check_usable("merge")
        other._check_usable("merge")
        self._check_matches(other._sums, other.grad_clip, "merge")
        for name, sums in other._sums.items():
            self._sums[name] += sums.to(self._sums[name].device)
        self._weight += other._weight

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been accumulated; as in torch, the tensors are the ones in use, not copies."""
        self._check_usable("state_dict")
        return {"sums": dict(self._sums), "weight": self._weight, "grad_clip": self.grad_clip}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what another accumulator's `state_dict` holds, which is copied.

        Raises:
            ValueError: it is no such thing, of other parameters, was clipped otherwise, or is damaged. Nothing has been
                loaded then.
        """
        check_type("FisherAccumulator.load_state_dict: state_dict", state_dict, Mapping, "a mapping")
        missing = {"sums", "weight", "grad_clip"} - state_dict.keys()
        if missing:
            raise ValueError(
                "FisherAccumulator.load_state_dict: what FisherAccumulator.state_dict() returned is required (got one "
                f"without {', '.join(sorted(missing))}); load a whole checkpoint"
            )
        sums, weight = state_dict["sums"], state_dict["weight"]
        check_type("FisherAccumulator.load_state_dict: sums", sums, Mapping, "a mapping")
        whole = all(isinstance(tensor, Tensor) and bool((tensor >= 0).all()) for tensor in sums.values())
        if not (whole and isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(
                "FisherAccumulator.load_state_dict: sums and weight must be numbers from 0 on (got "
                f"others, or weight {weight!r}); the checkpoint is damaged"
            )
        self._check_matches(sums, state_dict["grad_clip"], "load_state_dict")
        self.reset()
        for name, tensor in sums.items():
            self._sums[name].copy_(tensor)
        self._weight = float(weight)

    def _add(self, name: str, grad: Tensor, weight: float, grad_factor: float) -> bool | Tensor:
        """Adds one gradient's squares; returns whether it was finite, without waiting for a GPU to know."""
        grad = _readable(grad)
        if self._offload:
            grad = grad.to(self._offload)
        elif self._sums[name].device != grad.device:  # the model has moved
            self._sums[name] = self._sums[name].to(grad.device)
        if (kernels := _gpu.kernels_for(grad, self._sums[name])) is not None:
            return self._add_on_gpu(kernels, self._sums[name], grad, weight, grad_factor)
        native = backends.resolve("auto") if grad.is_cpu else None
        threads = torch.get_num_threads()
        if self.grad_clip is not None:
            everything = [grad], [None]
            squares = native.sum_of_squares(*everything, threads) if native else fallback.sum_of_squares(*everything)
            factor = self.grad_clip / (math.sqrt(squares) * abs(grad_factor) + 1e-6)
            grad_factor *= 1.0 if factor >= 1.0 else factor
        if native:
            return native.accumulate_squares(self._sums[name], grad, weight, grad_factor, threads)
        return fallback.accumulate_squares(self._sums[name], grad, weight, grad_factor)

    def _add_on_gpu(self, kernels: Any, score: Tensor, grad: Tensor, weight: float, grad_factor: float) -> Tensor:
        """`_add` by the kernels of the GPU that holds both, on its current stream: the gradient's, in a hook."""
        device = grad.device.index
        finite = torch.ones((), dtype=torch.uint8, device=grad.device)
        factors = weight, grad_factor, self.grad_clip
        memory_of = functools.partial(_gpu.memory, device)
        kernels.accumulate_squares(score, grad, *factors, finite, _gpu.stream_of(device), memory_of)
        return finite

    def _close(self, finite: dict[str, bool | Tensor], weight: float, where: str) -> None:
        """Counts the gradients just added as one of the given weight; raises if one of them was not finite."""
        known = iter(fallback.numbers([flag for flag in finite.values() if isinstance(flag, Tensor)]))
        bad = [name for name, flag in finite.items() if not (next(known) if isinstance(flag, Tensor) else flag)]
        if bad:
            self._damaged = True
            more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ValueError(
                f"{where}the gradient of '{bad[0]}'{more} must be finite (it has NaN or infinity); look for the cause "
                "in the batch or the loss, or use a smaller GradScaler scale"
            )
        self._weight += weight

    def _take_scores(self) -> dict[str, Tensor]:
        """The means, in the memory of the sums, which are gone."""
        return {name: _mean(self._sums.pop(name), self._weight) for name in list(self._sums)}

    def _check_usable(self, method: str) -> None:
        if self._damaged:
            raise ValueError(
                f"FisherAccumulator.{method}: the sums must be whole (they hold a part of a gradient that was not "
                "finite); call reset() and begin anew"
            )

    def _check_matches(self, sums: dict[str, Tensor], grad_clip: float | None, method: str) -> None:
        got = {name: tuple(tensor.shape) for name, tensor in sums.items()}
        required = {name: tuple(tensor.shape) for name, tensor in self._sums.items()}
        wrong = sorted(name for name in got.keys() | required.keys() if got.get(name) != required.get(name))
        if wrong:
            raise ValueError(
                f"FisherAccumulator.{method}: both must score the same parameters (got {len(wrong)} that differ, the "
                f"first is '{wrong[0]}': shape {required.get(wrong[0])} here, {got.get(wrong[0])} there); make both "
                "with the same model and `parameters`"
            )
        if grad_clip != self.grad_clip:
            raise ValueError(
                f"FisherAccumulator.{method}: both must have one grad_clip (got {self.grad_clip} here, {grad_clip} "
                "there)"
            )


def _selected(model: nn.Module, parameters: Selector) -> dict[str, nn.Parameter]:
    """The parameters to score, by name: those that require a gradient and are selected."""
    check_model(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    chosen = None if parameters is None else predicate(parameters, "parameters")
    found = {name: param for name, param in trained.items() if chosen is None or chosen(name)}
    if not found:
        names = ", ".join(list(trained)[:5]) or "none"
        raise ValueError(
            "Fisher scores: `parameters` must select at least one parameter that requires a gradient (got none of "
            f"{len(trained)}: {names}{', ...' if len(trained) > 5 else ''}); change `parameters` or unfreeze some"
        )
    for name, param in found.items():
        if is_sharded(param):
            raise ValueError(
                f"Fisher scores: parameters must be whole (got '{name}', a DTensor); estimate before fully_shard()"
            )
        if not param.is_floating_point():
            raise ValueError(
                f"Fisher scores: parameters must be real numbers (got '{name}', {param.dtype}); leave it out by "
                "`parameters`"
            )
    return found


def _readable(grad: Tensor) -> Tensor:
    """The gradient as the kernels read it: dense, and not lazily negated."""
    if grad.layout != torch.strided:
        return grad.to_dense()
    return grad.resolve_neg() if grad.is_neg() else grad


def _mean(sums: Tensor, weight: float) -> Tensor:
    """`sums / weight`, in place. The divisor in a tensor: by a number, torch multiplies with the reciprocal on CUDA."""
    return sums.div_(torch.full((), weight, dtype=sums.dtype, device=sums.device))
