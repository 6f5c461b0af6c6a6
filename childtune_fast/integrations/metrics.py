"""What a training loop can log of Child-Tuning: numbers by name, for any logger."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, is_sharded, shown
from ..child import ChildNetwork
from ..optimizer import ChildAdamW

__all__ = ["StepLog", "metrics_of_choice"]

Log = Callable[[dict[str, float], int], Any]


def metrics_of_choice(child: ChildNetwork, before: ChildNetwork | None = None) -> dict[str, float]:
    """Returns the numbers of a choice of a child network, {name: value}.

    Args:
        child: the child network that was chosen.
        before: the one in whose place it comes; None if it is the first (default: None).

    Returns:
        `child/weights`, how many maskable weights are in it; `child/density`, their share of all maskable weights;
        `child/density/LAYER`, the same of each layer by its name; and with `before` `child/overlap`, the share of the
        smaller child network's weights that are in both.

    Raises:
        ValueError: the child networks mask different parameters.
    """
    summary = child.summary()
    found = {"child/weights": float(summary.total.count), "child/density": summary.total.density}
    found |= {f"child/density/{row.name or 'outside of layers'}": row.density for row in summary.layers}
    return found if before is None else {**found, "child/overlap": child.overlap(before)}


def clip_factor(norm: float, limit: float) -> float:
    """Returns by what gradients of a norm are multiplied so that it is at most `limit`; NaN for a norm that is NaN."""
    factor = limit / (norm + 1e-6)
    return 1.0 if factor > 1 else factor


class StepLog:
    """Logs what every so many steps of an optimizer do: for a training loop of one's own.

        def log(numbers, step):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        steps = StepLog(optimizer, log, every=100)
        ...
        steps.remove()

    The numbers are `child/grad_norm`, the 2-norm of all gradients as the step finds them; `child/clip_factor`, by which
    `max_grad_norm` multiplies them, the least of all groups, if one has a limit and `norm_of` is "all" in each; and
    `child/moved`, the share of the weights with a gradient that the step changed. In mode F without weight decay that
    is `reserve_p` in the first step, and grows, since weights with momentum move too. Weights in bfloat16 move less
    often, since small steps round to none.

    A step that is logged copies the weights, and passes over them and their gradients; all others cost nothing. With
    sharded parameters every rank must have one, for the numbers are of the whole model.

    Args:
        optimizer: the ChildAdamW; of one that accelerate has prepared, its attribute `optimizer`.
        log: function of ({name: number}, number of the step, from 1, counted since this was made). Steps that a
            GradScaler skips count, and move nothing.
        every: number of steps from one log to the next; the first step is logged (default: 100).

    Raises:
        TypeError: `optimizer` is no ChildAdamW, or `log` no function.
        ValueError: `every` is not a whole number above 0.
    """

    def __init__(self, optimizer: ChildAdamW, log: Log, *, every: int = 100) -> None:
        check_type("StepLog: optimizer", optimizer, ChildAdamW, "a ChildAdamW")
        if not callable(log):
            raise TypeError(f"StepLog: log must be a function of numbers and step (got {type(log).__name__})")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"StepLog: every must be a whole number above 0 (got {shown(every)})")
        self._optimizer, self._log, self._every = optimizer, log, every
        self._steps = 0
        self._before: list[tuple[Tensor, Tensor]] = []  # each parameter, and its values before the step
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]

    def remove(self) -> None:
        """Ends the logging."""
        for hook in self._hooks:
            hook.remove()
        self._before = []

    @torch.no_grad()
    def _begin(self) -> None:
        if self._steps % self._every == 0:
            params = [param for group in self._optimizer.param_groups for param in group["params"]]
            self._before = [(param, param.detach().clone()) for param in params]

    @torch.no_grad()
    def _end(self) -> None:
        self._steps += 1
        before, self._before = self._before, []
        before = [(param, values) for param, values in before if param.grad is not None]  # a closure may have made it
        if not before:
            return
        moved = sum(_number((param.detach() != values).sum()) for param, values in before)
        found = {**self._norm([param.grad for param, _ in before]), "child/moved": 0.0}
        if total := sum(values.numel() for _, values in before):
            found["child/moved"] = moved / total
        self._log(found, self._steps)

    def _norm(self, grads: list[Tensor | None]) -> dict[str, float]:
        """Returns the norm of the gradients, which a step leaves as they are, and by what it multiplied them."""
        scale = getattr(self._optimizer, "grad_scale", None)  # by which a GradScaler has multiplied them
        norms = [torch.linalg.vector_norm(grad, dtype=_wide(grad.dtype)) for grad in grads if grad is not None]
        norm = math.sqrt(sum(_number(norm) ** 2 for norm in norms)) / (1.0 if scale is None else float(scale))
        groups = self._optimizer.param_groups
        limits = [group["max_grad_norm"] for group in groups if group["max_grad_norm"] is not None]
        if not limits or any(group["norm_of"] == "child" for group in groups):
            return {"child/grad_norm": norm}
        return {"child/grad_norm": norm, "child/clip_factor": clip_factor(norm, min(limits))}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _number(value: Any) -> float:
    return float(value.full_tensor() if is_sharded(value) else value)
