"""Who is measured: ours, torch's three AdamW, the naive published step, and the roof that memory sets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from childtune_fast import ChildAdamW

from .naive import NaiveChildAdamW
from .roof import make_roof
from .workloads import Workload

HYPER = {"lr": 1e-5, "weight_decay": 1e-2}
TITLES = {
    "ours": "ChildAdamW (F, p = 0.3)",
    "ours_p1": "ChildAdamW (p = 1)",
    "fused": "torch AdamW, fused",
    "foreach": "torch AdamW, foreach",
    "forloop": "torch AdamW, for-loop",
    "naive": "published code, naive",
    "roof": "the roof: the same bytes, no arithmetic",
}


@dataclass
class Contestant:
    """One of those who alternate.

    Attributes:
        step: takes one step.
        every: takes part in every so-manieth round; slow ones need fewer rounds for the same precision.
        before: called before each step, outside the timing.
    """

    step: Callable[[], object]
    every: int = 1
    before: Callable[[], None] | None = None


def make_contestants(work: Workload) -> dict[str, Contestant]:
    """Returns {name: contestant}, all on the tensors of `work`."""
    params = _parameters(work, work.grads)

    def ours(reserve_p: float) -> Contestant:
        optimizer = ChildAdamW(params, **HYPER, reserve_p=reserve_p, seed=0, backend="native")
        return Contestant(_with_state(optimizer, work.exp_avgs, work.exp_avg_sqs).step)

    def peer(every: int, **kind: bool) -> Contestant:
        optimizer = torch.optim.AdamW(params, **HYPER, **kind)
        return Contestant(_with_state(optimizer, work.peer_exp_avgs, work.peer_exp_avg_sqs).step, every)

    return {
        "ours": ours(0.3),
        "ours_p1": ours(1.0),
        "fused": peer(1, fused=True),
        "foreach": peer(4, foreach=True),
        "forloop": peer(4, foreach=False),
        "naive": _naive(work),
        "roof": Contestant(make_roof(work)),
    }


def _naive(work: Workload) -> Contestant:
    """It overwrites its gradients, so it has its own, set anew before each step."""
    params = _parameters(work, [grad.clone() for grad in work.grads])

    def restore() -> None:
        for param, grad in zip(params, work.grads, strict=True):
            param.grad.copy_(grad)

    optimizer = NaiveChildAdamW(params, **HYPER, reserve_p=0.3)
    return Contestant(_with_state(optimizer, work.peer_exp_avgs, work.peer_exp_avg_sqs, 0).step, 10, restore)


def _parameters(work: Workload, grads: list[torch.Tensor]) -> list[Parameter]:
    params = [Parameter(tensor) for tensor in work.params]  # shares its memory
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _with_state(optimizer, exp_avgs, exp_avg_sqs, step=None):
    """Gives the optimizer its state: torch's names, on the memory that all share; a step count of its own."""
    params = optimizer.param_groups[0]["params"]
    for param, exp_avg, exp_avg_sq in zip(params, exp_avgs, exp_avg_sqs, strict=True):
        count = torch.tensor(0.0) if step is None else step
        optimizer.state[param] = {"step": count, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return optimizer
