"""The contestants with averages of few bits: ours, torch's step, others' with 8-bit state, and the roof of ours."""

from dataclasses import replace

import torch
from torch import Tensor

from childtune_fast import ChildAdamW
from childtune_fast.ops.codes import block_count

from .contestants import HYPER, Contestant, make_parameters, random_child, torch_contestant
from .eight_bit_peers import PEERS, make_peer
from .roof import make_roof
from .workloads import Workload

LOW_BIT_TITLES = {
    "ours": "ChildAdamW (F, p = 0.3), 8-bit state",
    "ours_p1": "ChildAdamW (p = 1), 8-bit state",
    "ours_bfloat16": "ChildAdamW (F, p = 0.3), bfloat16 state",
    "fused": "torch AdamW, fused",
    "bitsandbytes": "bitsandbytes' AdamW8bit",
    "torchao": "torchao's AdamW8bit",
    "roof": "the roof: the bytes of 8-bit state, no arithmetic",
}
LOW_BIT_CHILD_TITLES = {
    "ours": "ChildAdamW (D, p = 0.3), 8-bit state",
    "ours_p0.1": "ChildAdamW (D, p = 0.1), 8-bit state",
    "fused": "torch AdamW, fused",
    "roof": "the roof at p = 0.3",
    "roof_p0.1": "the roof at p = 0.1",
}
RARELY = 10  # peers take part in one of so many rounds: their step is more than twenty times as long


class CodedState:
    """Averages in one byte a value that several contestants share, of each parameter of a workload.

    Attributes:
        codes: those of both averages, (parameters, 2) uint8 tensors of the parameters' shapes.
        scales: the same of the scales of blocks of 128.
    """

    def __init__(self, work: Workload) -> None:
        """Makes averages of zeros."""
        self.codes = [[torch.zeros(p.shape, dtype=torch.uint8) for _ in range(2)] for p in work.params]
        self.scales = [[torch.zeros(block_count(p.numel()), dtype=torch.uint8) for _ in range(2)] for p in work.params]

    def give(self, optimizer: ChildAdamW) -> ChildAdamW:
        """Returns the optimizer with these averages, or with the first of them if it has a child network."""
        masks = optimizer.child_masks
        for param, codes, scales in zip(optimizer.param_groups[0]["params"], self.codes, self.scales, strict=True):
            held = [c.view(-1)[: masks[param].count] if param in masks else c for c in codes]
            entries = {"exp_avg_codes": held[0], "exp_avg_sq_codes": held[1]}
            optimizer.state[param].update(
                step=torch.tensor(0.0), exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1], **entries
            )
        return optimizer

    def workload(self, work: Workload) -> Workload:
        """Returns a workload with these averages for ours."""
        return replace(work, exp_avgs=[c[0] for c in self.codes], exp_avg_sqs=[c[1] for c in self.codes])


def make_low_bit_contestants(work: Workload) -> tuple[dict[str, Contestant], list[Tensor]]:
    """Returns {name in LOW_BIT_TITLES: contestant}, all on the CPU, and the scales of ours.

    Those of 8-bit state share it, and begin with what one step with p = 1 makes of zeros. Ours in bfloat16 and the
    peers have states of their own.
    """
    params, coded = make_parameters(work, work.grads), CodedState(work)

    def ours(reserve_p: float) -> Contestant:
        optimizer = ChildAdamW(params, **HYPER, reserve_p=reserve_p, seed=0, state="8bit", backend="native")
        return Contestant(coded.give(optimizer).step)

    halves = ChildAdamW(params, **HYPER, reserve_p=0.3, seed=0, state="bfloat16", backend="native")
    contestants = {
        "ours": ours(0.3),
        "ours_p1": ours(1.0),
        "ours_bfloat16": Contestant(halves.step),
        "fused": torch_contestant(work, params, 1, fused=True),
        "roof": Contestant(make_roof(coded.workload(work))),
    }
    contestants["ours_p1"].step()
    for name in PEERS:
        peer = make_peer(name, params, **HYPER)
        if peer is not None:
            contestants[name] = Contestant(peer.step, RARELY)
    return contestants, [tensor for pair in coded.scales for tensor in pair]


def make_low_bit_child_contestants(work: Workload) -> tuple[dict[str, Contestant], list[Tensor]]:
    """Returns {name in LOW_BIT_CHILD_TITLES: contestant} for random child networks, on the CPU, and the scales of ours.

    They share their state as `make_low_bit_contestants` says, and that of a child network is the first values of it.
    """
    params, coded = make_parameters(work, work.grads), CodedState(work)
    children = {reserve_p: random_child(params, reserve_p) for reserve_p in (0.3, 0.1)}

    def ours(**which: object) -> Contestant:
        return Contestant(coded.give(ChildAdamW(params, **HYPER, state="8bit", backend="native", **which)).step)

    def roof(reserve_p: float) -> Contestant:
        return Contestant(make_roof(coded.workload(work), list(children[reserve_p].packed.values())))

    ours(reserve_p=1.0).step()
    contestants = {
        "ours": ours(child=children[0.3]),
        "ours_p0.1": ours(child=children[0.1]),
        "fused": torch_contestant(work, params, 1, fused=True),
        "roof": roof(0.3),
        "roof_p0.1": roof(0.1),
    }
    return contestants, [tensor for pair in coded.scales for tensor in pair]
