"""The contestants: ChildAdamW, torch's three AdamW, DeepSpeed's, the naive published step, and the memory's roof."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter, ParameterList
from torch.nn.utils import clip_grad_norm_

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.native import load

from .deepspeed_adam import load_deepspeed_adam
from .naive import NaiveChildAdamW
from .roof import make_roof
from .workloads import Workload

HYPER = {"lr": 1e-5, "weight_decay": 1e-2}
TITLES = {
    "ours": "ChildAdamW (F, p = 0.3)",
    "ours_p1": "ChildAdamW (p = 1)",
    "fused": "torch AdamW, fused",
    "deepspeed": "DeepSpeed's CPUAdam, float32 state",
    "foreach": "torch AdamW, foreach",
    "forloop": "torch AdamW, for-loop",
    "naive": "published code, naive",
    "ours_clipped": "ChildAdamW (F, max_grad_norm=1)",
    "fused_clipped": "clip_grad_norm_, then torch AdamW, fused",
    "roof": "the roof: the same bytes, no arithmetic",
}
CHILD_TITLES = {
    "ours": "ChildAdamW (D, p = 0.3)",
    "ours_p0.1": "ChildAdamW (D, p = 0.1)",
    "ours_p1": "ChildAdamW (p = 1)",
    "fused": "torch AdamW, fused",
    "roof": "the roof at p = 0.3",
    "roof_p0.1": "the roof at p = 0.1",
}


@dataclass
class Contestant:
    """One of the optimizers that are timed in turn.

    Attributes:
        step: function that takes one step, which is timed.
        every: the contestant takes part in one of so many rounds, because slow ones need fewer rounds for the same
            precision (default: 1).
        before: function that is called before each step, outside the timing; None for none (default: None).
    """

    step: Callable[[], object]
    every: int = 1
    before: Callable[[], None] | None = None


def make_contestants(work: Workload, slow: bool = True) -> dict[str, Contestant]:
    """Returns {name in TITLES: contestant}, all on the tensors of `work`, which are on the CPU.

    Args:
        work: the tensors.
        slow: whether those that take several times as long take part too: foreach, for-loop and naive (default: True).
    """
    params = make_parameters(work, work.grads)
    contestants = {
        "ours": _ours(work, params, 0.3),
        "ours_p1": _ours(work, params, 1.0),
        "fused": torch_contestant(work, params, 1, fused=True),
        "roof": Contestant(make_roof(work)),
    }
    deepspeed_adam = load_deepspeed_adam()
    if deepspeed_adam is not None:
        optimizer = deepspeed_adam(params, **HYPER)
        contestants["deepspeed"] = Contestant(_with_state(optimizer, work.exp_avgs, work.exp_avg_sqs, 0).step)
    if slow:
        contestants |= {
            "foreach": torch_contestant(work, params, 4, foreach=True),
            "forloop": torch_contestant(work, params, 4, foreach=False),
            "naive": _naive(work),
        }
    return contestants


def held_to_narrower_sets(contestants: dict[str, Contestant], names: list[str]) -> dict[str, Contestant]:
    """Returns {"NAME@SET": contestant}, each of `names` in each instruction set that is not this processor's widest.

    They are the same optimizers. They take part in one of three rounds, since the narrowest is several times slower.
    """
    native = load.load_native()
    *narrower, widest = native.supported_instruction_sets()

    def held(step: Callable[[], object], instruction_set: str) -> Callable[[], None]:
        def run() -> None:
            native.set_instruction_set(instruction_set)
            step()
            native.set_instruction_set(widest)

        return run

    return {
        f"{name}@{instruction_set}": Contestant(held(contestants[name].step, instruction_set), every=3)
        for instruction_set in reversed(narrower)
        for name in names
    }


def title_of(name: str, titles: dict[str, str]) -> str:
    """Returns the title of a contestant, with the instruction set that "NAME@SET" is held to."""
    name, _, instruction_set = name.partition("@")
    return f"{titles[name]}, held to {instruction_set}" if instruction_set else titles[name]


def make_gpu_contestants(work: Workload) -> dict[str, Contestant]:
    """Returns {name in TITLES: contestant}, all on the tensors of `work`, which are on a GPU."""
    params = make_parameters(work, work.grads)
    fused = torch_contestant(work, params, 1, fused=True)
    return {
        "ours": _ours(work, params, 0.3),
        "ours_p1": _ours(work, params, 1.0),
        "fused": fused,
        "foreach": torch_contestant(work, params, 1, foreach=True),
        "naive": _naive(work),
        "ours_clipped": _ours(work, params, 0.3, max_grad_norm=1.0),
        "fused_clipped": Contestant(lambda: (clip_grad_norm_(params, 1.0), fused.step())),
    }


def make_child_contestants(work: Workload) -> dict[str, Contestant]:
    """Returns {name in CHILD_TITLES: contestant} for random child networks in the tensors of `work`.

    The compact states are the first values of the dense ones. The roof is included only on the CPU.
    """
    params = make_parameters(work, work.grads)
    children = {reserve_p: random_child(params, reserve_p) for reserve_p in (0.3, 0.1)}
    masks = {reserve_p: list(child.packed.values()) for reserve_p, child in children.items()}

    def ours(reserve_p: float) -> Contestant:
        optimizer = ChildAdamW(params, **HYPER, child=children[reserve_p], backend="native")
        states = (
            [dense.view(-1)[: mask.count] for dense, mask in zip(tensors, masks[reserve_p], strict=True)]
            for tensors in (work.exp_avgs, work.exp_avg_sqs)
        )
        return Contestant(_with_state(optimizer, *states).step)

    contestants = {
        "ours": ours(0.3),
        "ours_p0.1": ours(0.1),
        "ours_p1": _ours(work, params, 1.0),
        "fused": torch_contestant(work, params, 1, fused=True),
    }
    if params[0].is_cpu:
        contestants |= {name: Contestant(make_roof(work, masks[p])) for name, p in (("roof", 0.3), ("roof_p0.1", 0.1))}
    return contestants


def random_child(params: list[Parameter], reserve_p: float) -> ChildNetwork:
    """Returns a random child network of the share `reserve_p` of the parameters, whose names are their numbers."""
    return ChildNetwork.random(ParameterList(params), reserve_p=reserve_p, seed=0, maskable=lambda name: True)


def _ours(work: Workload, params: list[Parameter], reserve_p: float, **options: float) -> Contestant:
    optimizer = ChildAdamW(params, **HYPER, reserve_p=reserve_p, seed=0, backend="native", **options)
    return Contestant(_with_state(optimizer, work.exp_avgs, work.exp_avg_sqs).step)


def torch_contestant(work: Workload, params: list[Parameter], every: int, **kind: bool) -> Contestant:
    """Returns torch's AdamW with the states that the workload has for it."""
    optimizer = torch.optim.AdamW(params, **HYPER, **kind)
    return Contestant(_with_state(optimizer, work.peer_exp_avgs, work.peer_exp_avg_sqs).step, every)


def _naive(work: Workload) -> Contestant:
    """Returns the naive step; it overwrites its gradients, so it has copies, which are restored before each step."""
    params = make_parameters(work, [grad.clone() for grad in work.grads])

    def restore() -> None:
        for param, grad in zip(params, work.grads, strict=True):
            param.grad.copy_(grad)

    optimizer = NaiveChildAdamW(params, **HYPER, reserve_p=0.3)
    return Contestant(_with_state(optimizer, work.peer_exp_avgs, work.peer_exp_avg_sqs, 0).step, 10, restore)


def make_parameters(work: Workload, grads: list[torch.Tensor]) -> list[Parameter]:
    """Returns parameters in the memory of the workload's, with `grads` as their gradients."""
    params = [Parameter(tensor) for tensor in work.params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _with_state(optimizer, exp_avgs, exp_avg_sqs, step=None):
    """Returns the optimizer with a state of torch's names: the given averages, and a step count of its own."""
    params = optimizer.param_groups[0]["params"]
    counter = params[0].device if optimizer.defaults.get("fused") else "cpu"  # where torch keeps it
    for param, exp_avg, exp_avg_sq in zip(params, exp_avgs, exp_avg_sqs, strict=True):
        count = torch.tensor(0.0, device=counter) if step is None else step
        optimizer.state[param].update(step=count, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return optimizer
