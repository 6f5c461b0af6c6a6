"""The running sums of squared gradients that FisherAccumulator and estimate_fisher both add to."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import Selector, is_sharded, lost_memory, resolved, shown
from ..ops.reference import clip_factor, numbers
from ..ops.squares import SquareKernels
from .scored import inner_model, scored_parameters
from .together import NotFiniteError, Together

Offload = Literal["cpu"]


class SquareSums:
    """Weighted sums of squared gradients, one float32 number for each scored weight, and their total weight.

    Of a sharded parameter (a DTensor), a rank has the sums of what it holds.

    Attributes:
        params: {parameter name: parameter}, those that are scored.
        sharded: those of them that are DTensors.
        ranks: the ranks that hold parts of the model.
        grad_clip: limit of each gradient's 2-norm before it is squared; None does not clip.
        offload: device that keeps the sums; None keeps each sum on its parameter's device.
        sums: {parameter name: float32 tensor of the shape of what this rank holds of the parameter}.
        weight: total weight of the gradients whose squares are in the sums.
        damaged: whether the sums hold a part of a gradient that was not finite, or of an addition that did not end.
        kept: None, or after `stage` the sums of what was added before the last `keep`; `sums` then has the rest.
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
            raise ValueError(f"offload must be 'cpu', or None to keep scores on their devices (got {shown(offload)})")
        model = inner_model(model)
        self.params = scored_parameters(model, names)
        self.sharded: dict[str, Any] = {name: param for name, param in self.params.items() if is_sharded(param)}
        self.ranks = Together(model)
        self.grad_clip = grad_clip
        self.offload = None if offload is None else torch.device(offload)
        self.kernels()  # builds the kernels, or raises, before a backward pass begins
        self.reset()

    @torch.inference_mode(False)  # sums made in inference mode could not be written outside of it
    def reset(self) -> None:
        """Begins again from zeros."""
        self.sums = {
            name: torch.zeros(self._local(param).shape, dtype=torch.float32, device=self.offload or param.device)
            for name, param in self.params.items()
        }
        self._held: dict[str, tuple[SquareKernels, Tensor, float, float]] = {}
        self.weight = 0.0
        self.damaged = False
        self.kept: dict[str, Tensor] | None = None

    @torch.inference_mode(False)
    def stage(self) -> None:
        """From now on, what is added is not part of the sums before `keep`, and may be dropped instead."""
        self.kept, self._kept_weight = self.sums, self.weight
        self.sums = {name: torch.zeros_like(sums) for name, sums in self.kept.items()}

    def keep(self) -> None:
        """Makes what was added since the last `keep` a part of the sums; does nothing without `stage`."""
        if self.kept is not None:
            for name, sums in self.sums.items():
                self.kept[name] = self.kept[name].to(sums.device).add_(sums)  # the model may have moved
                sums.zero_()
            self._kept_weight = self.weight

    def drop(self) -> None:
        """Forgets what was added since the last `keep`, after `stage`."""
        for sums in self.sums.values():
            sums.zero_()
        self._held.clear()
        self.weight, self.damaged = self._kept_weight, False

    def kernels(self) -> SquareKernels:
        """Returns the kernels for one pass over the gradients, on the devices where the parameters are now."""
        return SquareKernels.find({self.offload or param.device for param in self.params.values()})

    def _local(self, tensor: Tensor) -> Tensor:
        """Returns what this rank holds of a DTensor; any other tensor as it is."""
        if not is_sharded(tensor):
            return tensor
        from ..ops.shards import local_tensor

        return local_tensor(tensor)

    def gradient(self, name: str) -> Tensor | None:
        """Returns what this rank holds of a parameter's gradient, placed as the parameter; None without a gradient.

        All ranks that hold parts of the parameter must come here, since a gradient that is placed otherwise, such as
        partial sums, is redistributed: it must be whole before it is squared.

        Raises:
            ValueError: the gradient has no memory any more.
        """
        grad = self.params[name].grad
        if lost_memory(grad):
            raise ValueError(
                f"the gradient of '{name}' must have memory for its values (got one whose storage was freed); score "
                "before it is freed"
            )
        if grad is None or name not in self.sharded:
            return grad
        from ..ops.shards import local_gradient

        return local_gradient(self.sharded[name], grad)

    def add(
        self, kernels: SquareKernels, name: str, grad: Tensor, weight: float = 1.0, grad_factor: float = 1.0
    ) -> bool | Tensor:
        """Adds `weight * (grad * grad_factor)**2` to one parameter's sum.

        It waits for a GPU only where `offload` copies the gradient, or torch computes the norm for `grad_clip`. That
        of a sharded parameter is not known before all ranks have their parts: until `close`, its gradient is kept.

        Args:
            kernels: what `self.kernels()` returned for this pass over the gradients.
            name: name of the parameter.
            grad: what `gradient` returned for it, dense or sparse; it is only read.
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
        if self.grad_clip is not None and name in self.sharded:
            self._held[name] = (kernels, grad, weight, grad_factor)
            return True
        return kernels.add(self.sums[name], grad, weight, grad_factor, self.grad_clip)

    def add_rows(self, kernels: SquareKernels, name: str, indices: Tensor, values: Tensor) -> bool | Tensor:
        """Adds the square of the gradient of a table that is 0 beside some rows; see `add`.

        Args:
            kernels: what `self.kernels()` returned for this pass over the gradients.
            name: name of the parameter, which is not sharded.
            indices: the rows, int64 of shape [k], each once.
            values: their gradients, of shape [k, columns].
        """
        device = self.offload or values.device
        indices, sums = indices.to(device), self.sums[name].to(device)
        rows = sums.index_select(0, indices)
        finite = kernels.add(rows, values.to(device), 1.0, 1.0, self.grad_clip)
        self.sums[name] = sums.index_copy_(0, indices, rows)
        return finite

    def _add_held(self) -> dict[str, bool | Tensor]:
        """Adds the squares of the gradients that wait for their norms; one collective for each way of being cut."""
        if self.grad_clip is None or not self.sharded:
            return {}
        from ..ops.ranks import splits

        finite = {}
        for split, names in splits(self.sharded).items():
            here = [name for name in names if name in self._held]
            squares = dict.fromkeys(names, 0.0)  # of a parameter that has no gradient on this rank
            if here:
                kernels = self._held[here[0]][0]
                squares |= zip(here, kernels.sums([self._held[name][1] for name in here]), strict=True)
            over_ranks = split.sum(torch.tensor(list(squares.values()), dtype=torch.float64, device="cpu")).tolist()
            for name, total in zip(names, over_ranks, strict=True):
                if name in self._held:
                    kernels, grad, weight, factor = self._held.pop(name)
                    factor *= clip_factor(self.grad_clip, total, factor)
                    finite[name] = kernels.add(self.sums[name], grad, weight, factor, None)
        return finite

    def close(self, finite: dict[str, bool | Tensor], weight: float, where: str) -> None:
        """Ends the addition of one set of gradients: checks that all were finite, and adds their weight.

        Args:
            finite: {parameter name: what `add` returned for its gradient}.
            weight: weight that the gradients were added with.
            where: text that the error begins with.

        Raises:
            ValueError: a gradient was not finite, on any rank. The sums are then marked as damaged.
        """
        with self.adding():
            finite = {**finite, **self._add_held()}
            with self.ranks.agreeing():
                _check_finite(finite, where)
            self.weight += weight

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Marks the sums as damaged if the block, which writes them, does not come to its end."""
        try:
            yield
        except BaseException:
            self.damaged = True
            raise

    def tensors(self) -> dict[str, Tensor]:
        """Returns {parameter name: its sums}, those in use; of a sharded parameter a DTensor placed as it is."""
        return {name: self._placed(name, sums) for name, sums in self.sums.items()}

    @torch.inference_mode(False)
    def _placed(self, name: str, values: Tensor) -> Tensor:
        if name not in self.sharded:
            return values
        from ..ops.shards import dtensor_like

        return dtensor_like(values, self.sharded[name])

    def part_of(self, name: str, values: Tensor) -> Tensor:
        """Returns what this rank holds of values of a parameter's shape, be they whole or a DTensor, however placed.

        All ranks of a DTensor's mesh must come here.
        """
        if name not in self.sharded and not is_sharded(values):
            return values
        from ..ops import shards

        return shards.local_values(values, self.sharded[name]) if name in self.sharded else shards.whole_tensor(values)

    def means(self) -> dict[str, Tensor]:
        """Returns {parameter name: weighted mean of the squares}, as new float32 tensors."""
        return {name: self._placed(name, _mean(sums.clone(), self.weight)) for name, sums in self.sums.items()}

    def take_means(self) -> dict[str, Tensor]:
        """Returns {parameter name: weighted mean of the squares} in the memory of the sums, and forgets the sums."""
        sums, self.sums = self.sums if self.kept is None else self.kept, {}
        return {name: self._placed(name, _mean(sums.pop(name), self.weight)) for name in list(sums)}


def _check_finite(finite: dict[str, bool | Tensor], where: str) -> None:
    """Raises ValueError if a gradient was not finite; see `SquareSums.close`."""
    known = iter(numbers([flag for flag in finite.values() if isinstance(flag, Tensor)]))
    bad = [name for name, flag in finite.items() if not (next(known) if isinstance(flag, Tensor) else flag)]
    if bad:
        more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NotFiniteError(
            f"{where}the gradient of '{bad[0]}'{more} must be finite (it has NaN or infinity); look for the cause "
            "in the batch or the loss, or use a smaller GradScaler scale"
        )


def check_grad_clip(grad_clip: float | None) -> None:
    """Raises ValueError unless the limit of a gradient's norm is a number above 0, or None."""
    if grad_clip is not None and not (isinstance(grad_clip, (int, float)) and grad_clip > 0):
        raise ValueError(
            f"grad_clip must be a number above 0, or None for no clipping (got {shown(grad_clip)}); with 0, every "
            "score would be 0 and select nothing"
        )


def _readable(grad: Tensor) -> Tensor:
    """Returns the gradient in the form that the kernels can read: dense, and not lazily negated."""
    if grad.layout != torch.strided:
        return grad.to_dense()
    return resolved(grad)


def _mean(sums: Tensor, weight: float) -> Tensor:
    """Divides sums by their weight, in place, and returns them.

    The divisor is a tensor, because on CUDA torch divides by a Python number as a multiplication with the reciprocal.
    """
    return sums.div_(torch.full((), weight, dtype=sums.dtype, device=sums.device))
