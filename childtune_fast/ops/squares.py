"""Sums of squares and squared gradients: kernels on the CPU, kernels on a GPU, or torch compute them.

The choice is made once for a step, or once for a pass over a model's gradients, and not once for each gradient.
"""

import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import gpu, load
from . import foreach, reference, trust


def sums_of_squares(
    native: ModuleType | None, tensors: Sequence[Tensor], child_bits: Sequence[Tensor | None]
) -> list[float]:
    """Returns the sum of the squares of each gradient's elements; see `reference.sum_of_squares`.

    Args:
        native: the compiled module, if every tensor is on the CPU; None computes it in torch, on any device.
        tensors: gradients of any dtype and shape.
        child_bits: one entry for each tensor: the packed mask of its elements that count, uint8, or None if all count.
    """
    if native is None:
        return foreach.sums_of_squares(tensors, child_bits)
    return native.sums_of_squares(list(tensors), list(child_bits), torch.get_num_threads())


class SquareKernels(NamedTuple):
    """The kernels that add squared gradients to scores, found once for a pass over a model's gradients.

    Attributes:
        native: the compiled module, which squares gradients on the CPU; None if torch squares them.
        gpus: {number of a GPU: its kernels}; torch squares the gradients on all other GPUs and devices.
    """

    native: ModuleType | None
    gpus: dict[int, Any]

    @classmethod
    def find(cls, devices: Iterable[torch.device]) -> "SquareKernels":
        """Returns the kernels for gradients on these devices; CHILDTUNE_BACKEND, if set, chooses the backend.

        Raises:
            BackendError: CHILDTUNE_BACKEND is "native", and there are no kernels for one of the devices.
        """
        devices = set(devices)
        native = load.resolve("auto") if any(device.type == "cpu" for device in devices) else None
        on_gpus = [device.index for device in devices if device.type == "cuda"]
        kernels = {index: trust.kernels_of(index, load.chosen("auto")) for index in on_gpus}
        return cls(native, {index: found for index, found in kernels.items() if found is not None})

    def sums(self, grads: Sequence[Tensor]) -> list[float]:
        """Returns the sum of the squares of each gradient, in double; waits for each GPU once."""
        native = self.native if all(grad.is_cpu for grad in grads) else None
        return sums_of_squares(native, grads, [None] * len(grads))

    def add(
        self, score: Tensor, grad: Tensor, weight: float, grad_factor: float, grad_clip: float | None
    ) -> bool | Tensor:
        """Adds `weight * (grad * grad_factor)**2` to a score, in place; waits for a GPU only to clip in torch.

        Args:
            score: contiguous float32 tensor of the gradient's shape, on the gradient's device.
            grad: float32, float64, bfloat16 or float16 tensor, of any strides, but not lazily negated.
            weight: weight of the squares in the score.
            grad_factor: number that the gradient is multiplied by before it is clipped and squared.
            grad_clip: limit of the gradient's 2-norm after that multiplication; None does not clip.

        Returns:
            Whether every element of the gradient was finite: a bool, or a tensor of shape [] on the gradient's device.
        """
        kernels = self.gpus.get(grad.get_device()) if self.gpus else None
        if kernels is not None and grad.is_contiguous() and score.is_contiguous():
            return _add_on_gpu(kernels, score, grad, weight, grad_factor, grad_clip)
        native = self.native if grad.is_cpu else None
        if grad_clip is not None:
            (squares,) = sums_of_squares(native, [grad], [None])
            grad_factor *= reference.clip_factor(grad_clip, squares, grad_factor)
        if native is not None:
            return native.accumulate_squares(score, grad, weight, grad_factor, torch.get_num_threads())
        return reference.accumulate_squares(score, grad, weight, grad_factor)


def _add_on_gpu(
    kernels: Any, score: Tensor, grad: Tensor, weight: float, grad_factor: float, grad_clip: float | None
) -> Tensor:
    """Adds squares on the GPU that holds both tensors, on its current stream; in a hook, that is the gradient's."""
    device = grad.get_device()
    finite = torch.ones((), dtype=torch.uint8, device=grad.device)
    memory_of = functools.partial(gpu.memory, device)
    stream = gpu.stream_of(device)
    kernels.accumulate_squares(score, grad, weight, grad_factor, grad_clip, finite, stream, memory_of)
    return finite
