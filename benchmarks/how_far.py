"""How far Child-Tuning (F) moves weights, to AdamW at the same learning rate: `python -m benchmarks.how_far`.

Both are given the same gradients, without weight decay, and the distances of all weights from where they began are
compared: first of gradients whose signs never change, then of random signs, and then of the gradients that a real
transformer has while AdamW trains it on the standard library's docstrings. Half a minute on two cores.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from childtune_fast import ChildAdamW

from .finetune import data, methods, model, train
from .markdown import markdown

SHARES = (0.1, 0.2, 0.3, 0.5)
STEPS = 60
WEIGHTS = 100_000
LR = 2e-4


def distances(gradients: Iterator[list[Tensor]]) -> list[float]:
    """Returns how far F moves, to AdamW, for each of SHARES; the first that is yielded is where all begin."""
    start = [tensor.clone() for tensor in next(gradients)]
    moved = {p: [nn.Parameter(tensor.clone()) for tensor in start] for p in (*SHARES, 1.0)}
    optimizers = {p: ChildAdamW(params, lr=LR, weight_decay=0.0, reserve_p=p, seed=0) for p, params in moved.items()}
    for step in gradients:
        for p, params in moved.items():
            for param, grad in zip(params, step, strict=True):
                param.grad = grad
            optimizers[p].step()
    return [_distance(start, moved[p]) / _distance(start, moved[1.0]) for p in SHARES]


def _distance(start: list[Tensor], end: list[nn.Parameter]) -> float:
    squares = [(a - b.detach()).double().square().sum().item() for a, b in zip(start, end, strict=True)]
    return math.sqrt(sum(squares))


def of_signs(constant: bool) -> Iterator[list[Tensor]]:
    """Yields where weights begin, and then gradients of one size with signs that are constant, or random."""
    generator = torch.Generator().manual_seed(1)
    yield [torch.zeros(WEIGHTS)]
    for _ in range(STEPS):
        yield [torch.ones(WEIGHTS) if constant else torch.randn(WEIGHTS, generator=generator).sign()]


def of_training() -> Iterator[list[Tensor]]:
    """Yields the matrices in a transformer's layers, and then their gradients while AdamW trains it."""
    task = data.load_task("docstrings", limit=STEPS * methods.Settings.batch_size)
    settings = methods.Settings(epochs=1, max_length=64)
    tokenizer, backbone = model.load_pretrained(model.packaged_model())
    experiment = train.Experiment(tokenizer, backbone, task, settings, torch.device("cpu"))
    torch.manual_seed(0)
    net = model.Classifier(backbone, model.Head(backbone.config.hidden_size, len(task.labels), seed=0)).train()
    matrices = [param for name, param in net.named_parameters() if ".layer." in name and param.ndim == 2]
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)
    yield [param.detach() for param in matrices]
    inputs, targets = experiment.tokens["train"], experiment.targets["train"]
    for indices in train.batches(inputs.lengths, settings, seed=0):
        experiment.loss(net(inputs.batch(indices)), targets[indices]).backward()
        yield [param.grad for param in matrices if param.grad is not None]
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Measures and prints the table."""
    rows = {
        "sqrt(p)": [math.sqrt(p) for p in SHARES],
        "signs that never change": distances(of_signs(constant=True)),
        "random signs": distances(of_signs(constant=False)),
        f"{model.PACKAGED_MODEL}'s layers": distances(of_training()),
    }
    cells = [[name, *(f"{ratio:.2f}" for ratio in ratios)] for name, ratios in rows.items()]
    print(markdown([f"{STEPS} steps", *(f"p = {p:g}" for p in SHARES)], cells))


if __name__ == "__main__":
    main()
