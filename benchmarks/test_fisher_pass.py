"""Measures the passes that estimate Fisher scores, against a plain forward and backward pass of the same batch."""

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from childtune_fast.fisher.estimation import Estimation
from childtune_fast.fisher.examples import tensors_of, with_tensors
from childtune_fast.fisher.loss import loss_of_output
from childtune_fast.fisher.sums import SquareSums

from .contestants import Contestant
from .race import Race

SIZES = {"16x64": (16, 64), "32x128": (32, 128)}  # examples and tokens of a batch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus's
def test_fisher_pass(benchmark, rounds, quiet_process, size):
    """One batch each. What the pass for single examples tries once, in its first batch, is timed on its own."""
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    torch.manual_seed(0)
    config = transformers.BertConfig(  # MiniLM's sizes
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batch = make_batch(*SIZES[size], config.vocab_size)
    singles = [with_tensors(batch, [tensor[i : i + 1] for tensor in tensors_of(batch)]) for i in range(SIZES[size][0])]
    ours = Estimation(model, loss_of_output, SquareSums(model), "raise")
    with_opacus = opacus_pass(model, batch)
    with ours.hooks():

        def plain() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        def one_by_one() -> None:
            for single in singles:
                ours.whole(0, single)

        start = time.perf_counter()
        ours.examples(0, batch)
        first = time.perf_counter() - start
        assert ours.by_example is not None  # else the model would have been refused
        contestants = {
            "per_example": Contestant(lambda: ours.examples(0, batch)),
            "batch": Contestant(lambda: ours.whole(0, batch)),
            "plain": Contestant(plain),
            "one_by_one": Contestant(one_by_one, every=5),
        }
        if with_opacus is not None:
            contestants["opacus"] = Contestant(with_opacus, every=5)
        race = Race(contestants, rounds(15), untimed_step=False)
        race.run(benchmark)
    times = race.times()
    benchmark.extra_info.update(
        times_ns=times,
        ratios={name: race.ratios(name) for name in ("per_example", "batch")},
        trial_in_plain_passes=(1e9 * first - times["per_example"]["median"]) / times["plain"]["median"],
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )


def make_batch(examples: int, tokens: int, words: int) -> dict[str, Tensor]:
    """Returns a batch of random words without padding."""
    return {
        "input_ids": torch.randint(1000, words, (examples, tokens)),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.long),
        "labels": torch.arange(examples) % 2,
    }


def opacus_pass(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None] | None:
    """Returns a pass by opacus, which holds the gradients of all examples at once; None if it is not installed."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return None
    wrapped = GradSampleModule(copy.deepcopy(model).train())  # it works in training mode only
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    scores = [torch.zeros_like(param) for param in wrapped.parameters()]

    def step() -> None:
        wrapped(**batch).loss.backward()
        for score, param in zip(scores, wrapped.parameters(), strict=True):
            score += param.grad_sample.square().sum(0)
        wrapped.zero_grad()

    return step
