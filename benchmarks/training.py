"""Measures fine-tuning as a whole on a GPU: tokens per second and peak memory of a BERT-large with random weights.

Contestants cannot share memory, because memory is measured. Each trains alone, one after the other, twice. A step is
the forward pass, the backward pass and the optimizer's step, in bfloat16 autocast on float32 weights.
"""

import gc
from collections.abc import Callable

import torch

from childtune_fast import ChildAdamW, ChildNetwork

from .contestants import HYPER
from .gpu_race import Clock
from .markdown import markdown
from .naive import NaiveChildAdamW
from .race import spread

BATCH, LENGTH = 32, 128
REPETITIONS, WARMUP_STEPS = 2, 3


def _child_of(model: torch.nn.Module) -> ChildNetwork:
    return ChildNetwork.random(model, reserve_p=0.3, seed=0)


CONTESTANTS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "torch AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), **HYPER, fused=True),
    "ChildAdamW (F, p = 0.3)": lambda model: ChildAdamW(model.parameters(), **HYPER, backend="native"),
    "ChildAdamW (D, p = 0.3)": lambda model: ChildAdamW(
        model.parameters(), **HYPER, child=_child_of(model), backend="native"
    ),
    "published code, naive": lambda model: NaiveChildAdamW(model.parameters(), **HYPER),
}


def measure(clock: Clock, device: str, steps: int, scale: int) -> dict:
    """Returns the number of tokens in a step, and the milliseconds of each contestant's steps with its peak bytes."""
    batch = max(BATCH // scale, 1)
    data = {"tokens": batch * LENGTH, "contestants": {name: {"ms": []} for name in CONTESTANTS}}
    for _ in range(REPETITIONS):
        for name, noted in data["contestants"].items():
            milliseconds, peak = _train(CONTESTANTS[name], clock, device, steps, batch, scale)
            noted["ms"] += milliseconds
            noted["peak_bytes"] = peak
    return data


def _train(make_optimizer, clock: Clock, device: str, steps: int, batch: int, scale: int) -> tuple[list[float], float]:
    from transformers import BertConfig, BertForSequenceClassification

    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=1024 // scale,
        intermediate_size=4096 // scale,
        num_hidden_layers=24,
        num_attention_heads=max(16 // scale, 1),
        vocab_size=30522 // scale,
    )
    model = BertForSequenceClassification(config).to(device).train()
    optimizer = make_optimizer(model)
    words = torch.randint(config.vocab_size, (batch, LENGTH), device=device)
    labels = torch.randint(2, (batch,), device=device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(input_ids=words, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [clock.time(step)[0] for _ in range(WARMUP_STEPS + steps)]
    peak = torch.cuda.max_memory_allocated(device) if clock.on_gpu else float("nan")
    return times[WARMUP_STEPS:], peak


def table(data: dict) -> str:
    """Returns the table of all contestants, as Markdown."""
    rows = []
    for name, noted in data["contestants"].items():
        times = spread(noted["ms"])
        speed = data["tokens"] / (1e-3 * times["median"])
        quartiles = f"{times['median']:.3g} [{times['q1']:.3g}, {times['q3']:.3g}]"
        rows.append([name, f"{speed:,.0f}", quartiles, f"{noted['peak_bytes'] / 1e9:.2f}"])
    title = f"## Fine-tuning a BERT-large of random weights, {data['tokens']} tokens a step, bfloat16 autocast\n\n"
    return title + markdown(["", "tokens/s", "ms a step", "peak GB"], rows)
