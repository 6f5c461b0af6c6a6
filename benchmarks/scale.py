"""What a rank holds of a large model that is cut over ranks, counted parameter by parameter on the meta device.

    python -m benchmarks.scale              # the table of docs/scale.md
    python -m benchmarks.scale --overhead   # the time of a step for each sharded parameter, and for each whole one

For the table nothing is allocated. tests/distributed/check_scale.py holds the counts against what a small model takes.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.child.maskable import maskable_parameters
from childtune_fast.ops.shards import dtensor_like

BLOCK = 1024  # weights of a mask that share an offset of 8 bytes
CHUNK = 1 << 19  # numbers of 64 bytes in a selection's temporaries: see docs/scale.md
SHAPES = {
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
ROWS = (("7 B", 8), ("70 B", 64))


class Part(NamedTuple):
    """The weights of one parameter that the first rank holds, which are the most, and of the whole one."""

    local: int
    whole: int
    masked: bool


def parts(named: Iterable[tuple[str, torch.Tensor]], ranks: int, masked: Iterable[str]) -> list[Part]:
    """Returns the parts of parameters that are cut along their first dimension, as fully_shard does."""
    masked = set(masked)
    return [Part(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]), p.numel(), name in masked) for name, p in named]


def held(of: list[Part], reserve_p: float, weight_bytes: int) -> dict[str, float]:
    """Returns the bytes of a rank, if the child network's weights lie evenly among the ranks."""
    local = sum(part.local for part in of)
    in_mask = sum(part.local for part in of if part.masked)
    whole_mask = sum(part.whole for part in of if part.masked)
    largest = max(part.local for part in of if part.masked)
    return {
        "parameters": weight_bytes * local,
        "gradients": weight_bytes * local,
        "state of AdamW or F": 8 * local,
        "state of D": 8 * (local - in_mask * (1 - reserve_p)),
        "its part of the masks": mask_bytes(in_mask),
        "whole masks, on the host": mask_bytes(whole_mask),
        "Fisher scores": 4 * in_mask,
        "the selection, beside them": 64 * CHUNK + largest * (1 / 8 + 48 / BLOCK),
        "state_dict() of D, while it is saved": 8 * local + in_mask,
    }


def mask_bytes(weights: float) -> float:
    """Returns the bytes of packed masks: a bit for each weight, and an offset for each block."""
    return weights * (1 / 8 + 8 / BLOCK)


def llama(size: str) -> nn.Module:
    """Returns a model of LLaMA-2's shapes, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPES[size]))


def table(reserve_p: float) -> list[str]:
    """Returns the table in Markdown, in GB of 1e9 bytes."""
    columns = []
    for size, ranks in ROWS:
        model = llama(size)
        of = parts(model.named_parameters(), ranks, maskable_parameters(model, None))
        columns.append((f"{size} on {ranks} ranks", held(of, reserve_p, 2)))
    lines = [f"| GB on a rank | {' | '.join(title for title, _ in columns)} |", "|---|" + "--:|" * len(columns)]
    rows = ((what, " | ".join(f"{found[what] / 1e9:.2f}" for _, found in columns)) for what in columns[0][1])
    return [*lines, *(f"| {what} | {numbers} |" for what, numbers in rows)]


# ---- The time of the host ------------------------------------------------------------------------------------------

TENSORS = 1000  # of 4 weights, so that a step's time is nearly all overhead
OPTIONS = {"F": {"seed": 0}, "F, clipped": {"seed": 0, "max_grad_norm": 1.0}, "AdamW": {"reserve_p": 1.0}, "D": {}}


def optimizer_of(sharded: bool, options: dict[str, Any]) -> ChildAdamW:
    """Returns an optimizer of tensors with gradients, whole or DTensors on a mesh of this rank alone."""
    model = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(TENSORS))
    if not options:
        half = {name: torch.arange(4) < 2 for name, _ in model.named_parameters()}
        options = {"child": ChildNetwork.from_masks(model, half)}
    if sharded:
        mesh = init_device_mesh("cpu", (1,))
        for i, param in enumerate(model):
            model[i] = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
    for param in model:
        param.grad = dtensor_like(torch.randn(4), param) if sharded else torch.randn(4)
    return ChildAdamW(model.parameters(), **options)


def overhead(rounds: int = 61) -> list[str]:
    """Returns a line for each option: microseconds of a step for a tensor, the least of alternating rounds."""
    with tempfile.NamedTemporaryFile() as rendezvous:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=0, world_size=1)
        torch.set_num_threads(1)
        lines = []
        for name, options in OPTIONS.items():
            optimizers = [optimizer_of(sharded, options) for sharded in (False, True)]
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds + 2):
                for optimizer, of_one in zip(optimizers, seconds, strict=True):
                    begin = time.perf_counter()
                    optimizer.step()
                    of_one.append(time.perf_counter() - begin)
            whole, cut = (min(of_one[2:]) / TENSORS * 1e6 for of_one in seconds)
            lines.append(f"{name}: {whole:.2f} us whole, {cut:.2f} us sharded, {cut / whole:.2f} times")
        dist.destroy_process_group()
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reserve-p", type=float, default=0.3, help="share of the maskable weights (default: 0.3)")
    parser.add_argument("--overhead", action="store_true", help="measure the host's time instead")
    arguments = parser.parse_args()
    print("\n".join(overhead() if arguments.overhead else table(arguments.reserve_p)))
