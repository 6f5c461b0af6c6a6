"""The tensors that a step works on: BERT's, a thousand tiny ones, or large ones; all contestants share them."""

from dataclasses import dataclass

import torch
from torch import Tensor


def bert_shapes(hidden: int, layers: int) -> list[tuple[int, ...]]:
    """Returns the shapes of the parameters of transformers' `BertModel`, in its order."""
    inner, vocabulary, positions = 4 * hidden, 30522, 512
    dense, norm = [(hidden, hidden), (hidden,)], [(hidden,), (hidden,)]
    embeddings = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    layer = [*dense * 4, *norm, (inner, hidden), (inner,), (hidden, inner), (hidden,), *norm]  # query, key, value, out
    return [*embeddings, *layer * layers, *dense]  # the last is the pooler


WORKLOADS = {
    "bert-base": bert_shapes(768, 12),  # 109 M weights in 199 tensors: BertConfig()
    "1000x33": [(33,)] * 1000,
}
GPU_WORKLOADS = {
    "bert-large": bert_shapes(1024, 24),  # 335 M weights in 391 tensors
    "1.3B": bert_shapes(2048, 24),  # 1.3 G weights
}
LARGE = [(1024, 4096)] * 20  # 84 M weights, and more memory than any cache holds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Workload:
    """Parameters, fixed gradients and optimizer states: entry `i` of each list belongs to the same parameter.

    All contestants use the same tensors, so that none has a better placement in memory. torch's optimizers keep their
    state in the parameter's dtype and ChildAdamW keeps float32. Where the two differ, the peers have a second pair of
    states.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    peer_exp_avgs: list[Tensor]
    peer_exp_avg_sqs: list[Tensor]

    @property
    def weights(self) -> int:
        """The number of weights in all parameters."""
        return sum(param.numel() for param in self.params)

    @property
    def small(self) -> bool:
        """Whether everything fits in a CPU's caches."""
        return self.weights < 2**20


def make_workload(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> Workload:
    """Returns tensors of pretrained magnitude: weights of about 0.02, gradients of about 0.001, and states of zeros.

    In float16 gradients are about 1, as a loss scale makes them: the square of 0.001 is 0 in the peers' float16 state.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    def states(dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    params = [normal(shape, 2e-2) for shape in shapes]
    grads = [normal(shape, 1.0 if dtype is torch.float16 else 1e-3) for shape in shapes]
    ours = [states(torch.float32) for _ in range(2)]
    peers = ours if dtype is torch.float32 else [states(dtype) for _ in range(2)]
    return Workload(params, grads, *ours, *peers)
