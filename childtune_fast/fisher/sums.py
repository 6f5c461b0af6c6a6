"""The running sums of squared gradients that FisherAccumulator and estimate_fisher both add to."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..arguments import Selector, check_model, is_sharded, predicate
from ..ops.reference import numbers
from ..ops.squares import SquareKernels
from ..ops.tensor_parts import kind_of

Offload = Literal["cpu"]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SquareSums:
    """Weighted sums of squared gradients, one float32 number for each scored weight, and their total weight.

    Attributes:
        params: {parameter name: parameter}, those that are scored.
        grad_clip: limit of each gradient's 2-norm before it is squared; None does not clip.
        offload: device that keeps the sums; None keeps each sum on its parameter's device.
        sums: {parameter name: float32 tensor of the parameter's shape}.
        weight: total weight of the gradients whose squares are in the sums.
        damaged: whether the sums hold a part of a gradient that was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        grad_clip: float | None = None,
        names: Selector = None,
        offload: Offload | None = None,
    ) -> None:
        """Makes sums of zeros; raises for the same arguments as FisherAccumulator."""
        check_grad_clip(grad_clip)
        if offload not in (None, "cpu"):
            raise ValueError(f"offload must be 'cpu', or None to keep scores on their devices (got {offload!r})")
        self.params = _scored(model, names)
        self.grad_clip = grad_clip
        self.offload = None if offload is None else torch.device(offload)
        self.kernels()  # builds the kernels, or raises, before a backward pass begins
        self.reset()

    @torch.inference_mode(False)  # sums made in inference mode could not be written outside of it
    def reset(self) -> None:
        """Begins again from zeros."""
        self.sums = {
            name: torch.zeros(param.shape, dtype=torch.float32, device=self.offload or param.device)
            for name, param in self.params.items()
        }
        self.weight = 0.0
        self.damaged = False

    def kernels(self) -> SquareKernels:
        """Returns the kernels for one pass over the gradients, on the devices where the parameters are now."""
        return SquareKernels.find({self.offload or param.device for param in self.params.values()})

    def add(
        self, kernels: SquareKernels, name: str, grad: Tensor, weight: float = 1.0, grad_factor: float = 1.0
    ) -> bool | Tensor:
        """Adds `weight * (grad * grad_factor)**2` to one parameter's sum.

        It waits for a GPU only where `offload` copies the gradient, or torch computes the norm for `grad_clip`.

        Args:
            kernels: what `self.kernels()` returned for this pass over the gradients.
            name: name of the parameter.
            grad: its gradient, dense or sparse, of the parameter's shape; it is only read.
            weight: weight of the square in the sum (default: 1).
            grad_factor: number that the gradient is multiplied by before it is clipped and squared (default: 1).

        Returns:
            Whether every element of the gradient was finite: a bool, or a tensor of shape [] on the gradient's device.
        """
        grad = _readable(grad)
        if self.offload is not None:
            grad = grad.to(self.offload)
        elif self.sums[name].device != grad.device:  # the model has moved
            self.sums[name] = self.sums[name].to(grad.device)
        return kernels.add(self.sums[name], grad, weight, grad_factor, self.grad_clip)

    def close(self, finite: dict[str, bool | Tensor], weight: float, where: str) -> None:
        """Ends the addition of one set of gradients: checks that all were finite, and adds their weight.

        Args:
            finite: {parameter name: what `add` returned for its gradient}.
            weight: weight that the gradients were added with.
            where: text that the error begins with.

        Raises:
            ValueError: a gradient was not finite. The sums are then marked as damaged.
        """
        known = iter(numbers([flag for flag in finite.values() if isinstance(flag, Tensor)]))
        bad = [name for name, flag in finite.items() if not (next(known) if isinstance(flag, Tensor) else flag)]
        if bad:
            self.damaged = True
            more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ValueError(
                f"{where}the gradient of '{bad[0]}'{more} must be finite (it has NaN or infinity); look for the cause "
                "in the batch or the loss, or use a smaller GradScaler scale"
            )
        self.weight += weight

    def means(self) -> dict[str, Tensor]:
        """Returns {parameter name: weighted mean of the squares}, as new float32 tensors."""
        return {name: _mean(sums.clone(), self.weight) for name, sums in self.sums.items()}

    def take_means(self) -> dict[str, Tensor]:
        """Returns {parameter name: weighted mean of the squares} in the memory of the sums, and forgets the sums."""
        return {name: _mean(self.sums.pop(name), self.weight) for name in list(self.sums)}


def check_grad_clip(grad_clip: float | None) -> None:
    """Raises ValueError unless the limit of a gradient's norm is a number above 0, or None."""
    if grad_clip is not None and not (isinstance(grad_clip, (int, float)) and grad_clip > 0):
        raise ValueError(
            f"grad_clip must be a number above 0, or None for no clipping (got {grad_clip!r}); with 0, every score "
            "would be 0 and select nothing"
        )


def _scored(model: nn.Module, names: Selector) -> dict[str, Parameter]:
    """Returns the parameters to score, by name: those that require a gradient and are selected."""
    check_model(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wanted = None if names is None else predicate(names, "names")
    found = {name: param for name, param in trained.items() if wanted is None or wanted(name)}
    if not found:
        listed = ", ".join(list(trained)[:5]) or "none"
        raise ValueError(
            "Fisher scores: `names` must select at least one parameter that requires a gradient (got none of "
            f"{len(trained)}: {listed}{', ...' if len(trained) > 5 else ''}); change `names` or unfreeze some"
        )
    for name, param in found.items():
        _check_scorable(name, param)
    return found


def _check_scorable(name: str, param: Parameter) -> None:
    """Raises ValueError unless a parameter is a whole, dense one of real numbers, with values."""
    if is_sharded(param):
        raise ValueError(
            f"Fisher scores: parameters must be whole (got '{name}', a DTensor); estimate before fully_shard()"
        )
    kind = kind_of(param)
    if kind in ("meta", "uninitialized"):
        raise ValueError(
            f"Fisher scores: parameters must have values (got '{name}', which is {kind}); load the model's weights "
            "first, or leave it out by `names`"
        )
    if param.layout != torch.strided or param.is_nested or param.dtype not in _DTYPES:
        raise ValueError(
            f"Fisher scores: parameters must be dense and of {' or '.join(map(str, _DTYPES))} (got '{name}', "
            f"{kind or 'dense'}, {param.dtype}); leave it out by `names`"
        )


def _readable(grad: Tensor) -> Tensor:
    """Returns the gradient in the form that the kernels can read: dense, and not lazily negated."""
    if grad.layout != torch.strided:
        return grad.to_dense()
    return grad.resolve_neg() if grad.is_neg() else grad


def _mean(sums: Tensor, weight: float) -> Tensor:
    """Divides sums by their weight, in place, and returns them.

    The divisor is a tensor, because on CUDA torch divides by a Python number as a multiplication with the reciprocal.
    """
    return sums.div_(torch.full((), weight, dtype=sums.dtype, device=sums.device))
