"""Measures whole steps of fine-tuning a BERT of random weights, and the optimizer's share in them, on the CPU.

A batch of 4 sentences of 32 words is about the smallest that people train with: the larger the batch, the smaller the
optimizer's share, and the less the optimizers could differ.
"""

import os

import pytest
import torch

from .contestants import Contestant
from .costs import TimedCall
from .race import Race, spread
from .tables import TRAINING_TITLES
from .training import CONTESTANTS

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
MODELS = {"minilm": MINILM, "bert-base": {}}  # options of BertConfig; its defaults are BERT-base
ROUNDS = {"minilm": 81, "bert-base": 25}
EXAMPLES, TOKENS = 4, 32


@pytest.mark.parametrize("size", MODELS)
def test_training_step(benchmark, rounds, quiet_process, size):
    """All optimizers train one model in turn, so that weights and gradients lie at the same place for each."""
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    torch.manual_seed(0)
    config = transformers.BertConfig(**MODELS[size])
    model = transformers.BertForSequenceClassification(config).train()
    words = torch.randint(config.vocab_size, (EXAMPLES, TOKENS))
    labels = torch.arange(EXAMPLES) % 2
    optimizers = {name: CONTESTANTS[title](model) for name, title in TRAINING_TITLES.items()}
    updates = {name: TimedCall(optimizer.step) for name, optimizer in optimizers.items()}

    def step(name: str) -> None:
        model(input_ids=words, labels=labels).loss.backward()
        updates[name]()
        optimizers[name].zero_grad()

    race = Race({name: Contestant(lambda name=name: step(name)) for name in optimizers}, rounds(ROUNDS[size]), False)
    race.run(benchmark)
    in_step = {name: [1e9 * s for s in update.seconds[-race.rounds :]] for name, update in updates.items()}
    shares = {name: [a / b for a, b in zip(in_step[name], race.samples[name], strict=True)] for name in optimizers}
    benchmark.extra_info.update(
        weights=sum(param.numel() for param in model.parameters()),
        tokens=words.numel(),
        times_ns=race.times(),
        ratios={name: race.ratios(name) for name in ("ours", "child")},
        optimizer_ns={name: spread(samples) for name, samples in in_step.items()},
        optimizer_share={name: spread(samples) for name, samples in shares.items()},
        interruptions_per_s=race.interruptions_per_s,
        samples_ns=race.samples,
    )
    assert all(torch.isfinite(param).all() for param in model.parameters())
