"""A small transformer, the ways to cut it over ranks, and gradients that are the same however it is cut."""

import torch
from helpers import same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from childtune_fast import ChildNetwork


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.up(y + torch.tanh(self.mix(y)))))


class Tiny(nn.Module):
    """Rows that do not divide by two or four, biases that leave some of four ranks empty."""

    def __init__(self, width=10, inner=21, layers=2, words=17, classes=3):
        super().__init__()
        self.emb = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def tiny(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Tiny(**sizes).to(dtype)


def given(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batch(number, rows=8, words=17, classes=3):
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(0, words, (rows, 5), generator=generator), torch.randint(
        0, classes, (rows,), generator=generator
    )


def child_of(model):
    return ChildNetwork.random(model, reserve_p=0.3, seed=1)


# ---- The ways ------------------------------------------------------------------------------------------------------


def whole(model, world):
    return model


def fsdp2(model, world, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def by_columns(model, world):
    """Matrices are cut along dimension 1 where it divides, as FSDP2 asks."""
    return fsdp2(model, world, shard_placement_fn=lambda p: Shard(1 if p.dim() == 2 and p.shape[1] % world == 0 else 0))


def hsdp(model, world):
    sizes = (2, 2) if world == 4 else (1, world)
    return fsdp2(model, world, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")))


def fsdp2_and_tp(model, world):
    """The rows of `up` are cut in two dimensions of the mesh, by _StridedShard; those of `down` by row and column."""
    sizes = (2, 2) if world == 4 else (1, world)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fsdp2(model, world, mesh=mesh["data"])


EVEN = {"width": 12, "inner": 20}  # of a model that tensor parallelism can cut in two
WAYS = {
    "whole": (whole, {}),
    "FSDP2": (fsdp2, {}),
    "FSDP2, even": (fsdp2, EVEN),
    "FSDP2, columns": (by_columns, EVEN),
    "HSDP": (hsdp, {}),
    "FSDP2 and TP": (fsdp2_and_tp, EVEN),
}


# ---- Gradients -----------------------------------------------------------------------------------------------------


def assign(model, step):
    """Gives each parameter the gradient of a step, cut as the parameter is; some have none in some steps."""
    for number, param in enumerate(model.parameters()):
        if (number + step) % 7 == 3:
            param.grad = None
            continue
        grad = given(param.shape, 7919 * step + number) * (0.5 + number % 3)
        param.grad = like(grad.to(param.dtype), param)


def like(values, param):
    """A whole tensor, the same on every rank, cut as a parameter is, without communication."""
    if isinstance(param, DTensor):
        return distribute_tensor(values, param.device_mesh, param.placements, src_data_rank=None)
    return values


def equal_parts(tensor, whole):
    """Whether what this rank holds has the bits of its part of a whole tensor."""
    return same_bits(local(tensor), local(like(whole, tensor)))


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def go(model, optimizer, steps):
    for step in steps:
        assign(model, step)
        optimizer.step()
    return model
