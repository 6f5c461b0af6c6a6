"""The loss of a batch: whose gradient the Fisher scores are of, and what is required of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """The loss that transformers' models compute themselves."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        got = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"estimate_fisher: without loss_fn a batch must be a mapping with 'labels' (got {got}); pass "
            "loss_fn=lambda model, batch: ..., which returns the loss"
        )
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            f"estimate_fisher: without loss_fn the model must return an output with a loss (got "
            f"{type(output).__name__}); pass loss_fn=lambda model, batch: ..., which returns the loss"
        )
    return loss


def check_loss(loss: Any, index: int) -> None:
    """Raises ValueError if the loss of batch number `index` is not one finite number that has a graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}, {loss.requires_grad=}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"estimate_fisher: batch {index}: the loss must be a tensor of one number with a graph (got {got}); reduce "
            "it by .mean(), and do not detach it"
        )
    check_finite(loss.detach(), index)


def check_finite(losses: Tensor, index: int) -> None:
    """Raises ValueError if a loss of batch number `index` is not finite."""
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"estimate_fisher: batch {index}: the loss must be finite (got {losses.flatten().tolist()}); look for the "
            "cause in that batch"
        )
