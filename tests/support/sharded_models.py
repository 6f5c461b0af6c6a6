"""Helpers of the checks of scores over ranks: models cut in every way, and batches whose gradients are exact."""

import contextlib
from collections import Counter
from unittest import mock

import torch
from helpers import same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from childtune_fast import estimate_fisher
from childtune_fast.fisher.sums import SquareSums

BATCHES, SIZE = 3, 4  # batches of a rank, examples in one
CLIP = 20.0  # some gradients of the exact model are longer, some are not


def whole_numbers(*shape, generator):
    return torch.randint(-3, 4, shape, generator=generator).float()


def exact_model():
    """Linear layers alone, of whole numbers: sums are exact in any order, over whatever ranks. Few rows, many ranks."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(whole_numbers(*param.shape, generator=generator))
    return model


def exact_batches(ranks, count=BATCHES):
    """The batches of some ranks, each of them concatenated."""
    found = [exact_batch(ranks, i) for i in range(count)]
    return [{key: torch.cat([batch[key] for batch in of_ranks]) for key in ("x", "c")} for of_ranks in found]


def exact_batch(ranks, i):
    generators = [torch.Generator().manual_seed(100 * i + rank) for rank in ranks]
    return [{"x": whole_numbers(SIZE, 6, generator=g), "c": whole_numbers(SIZE, 3, generator=g)} for g in generators]


def exact_loss(model, batch):
    return (model(batch["x"]) * batch["c"]).sum(-1).mean()


def estimate(model, batches, **options):
    return estimate_fisher(model, batches, **{"loss_fn": exact_loss, "progress": False, **options})


def under_fsdp(model, mesh=None):
    """Shards the first two layers and the root, each on its own."""
    options = {} if mesh is None else {"mesh": mesh}
    for layer in list(model)[:2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def under_tp(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


def cut_models(rank, world):
    """{way of being cut: (model, the ranks whose batches this one takes at once, those whose batches all take)}."""
    everyone = list(range(world))
    found = {
        "FSDP2": (under_fsdp(exact_model()), [rank], everyone),
        "TP": (under_tp(exact_model(), mesh_of(world)), [0], [0]),
    }
    one_layer = exact_model()
    fully_shard(one_layer[1])
    found["one layer alone"] = (one_layer, everyone, everyone)  # other gradients are those of the rank's own batches
    if world == 4:
        mesh = mesh_of(2, 2)
        found["HSDP"] = (under_fsdp(exact_model(), mesh), [rank], everyone)
        found["FSDP2 x TP"] = (under_fsdp(under_tp(exact_model(), mesh["tp"]), mesh["dp"]), [rank // 2], [0, 1])
    return found


def whole(tensors):
    """Tensors by name, DTensors among them gathered."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


class Normed(nn.Module):
    """A normalised block, whose norm gets partial gradients under sequence parallelism."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def under_sequence_parallel(model, mesh):
    up, down = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, {"norm": SequenceParallel(), "up": up, "down": down})


def sequences(mesh=None):
    """Batches of sequences; on a mesh, cut along the sequence."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(3, 8, 8, generator=generator) for _ in range(BATCHES)]
    return found if mesh is None else [distribute_tensor(x, mesh, [Shard(1)]) for x in found]


# ---- What the checks ask --------------------------------------------------------------------------------------------


def assert_same(a, b):
    a, b = whole(a), whole(b)
    assert list(a) == list(b)
    for name in a:
        assert same_bits(a[name], b[name]), name


def placed_as(scores, model):
    """Whether each score lies on the ranks as its parameter does, in as many elements."""
    for name, param in model.named_parameters():
        score = scores[name]
        if type(score) is not type(param.data):
            return False
        if isinstance(param, DTensor):
            there, here = param.to_local(), score.to_local()
            if (score.placements, score.device_mesh) != (param.placements, param.device_mesh):
                return False
            if (here.shape, here.dtype, score.shape) != (there.shape, torch.float32, param.shape):
                return False
    return True


@contextlib.contextmanager
def counted_additions():
    counts, add = Counter(), SquareSums.add

    def counted(self, kernels, name, *args):
        counts[name] += 1
        return add(self, kernels, name, *args)

    with mock.patch.object(SquareSums, "add", counted):
        yield counts


def never():
    raise AssertionError("a batch was asked for")
    yield
