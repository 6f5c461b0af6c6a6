"""One rank on a device: what it steps, saves and chooses there is what a rank on the CPU does."""

import torch
from check_steps import OPTIONS, expected, optimizer_of
from cut_models import batch, child_of, go, local, tiny
from helpers import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from childtune_fast import ChildNetwork, estimate_fisher


def sharded(device, world):
    model = tiny().to(device)
    child = child_of(model)
    mesh = init_device_mesh(device, (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), child


def steps_and_checkpoints(rank, world, device):
    for name in ("F", "F, clipped", "D", "D, clipped"):
        model, child = sharded(device, world)
        optimizer = optimizer_of(model, OPTIONS[name], child, backend="native")
        go(model, optimizer, range(2))
        state = optimizer.state_dict()
        optimizer = optimizer_of(model, OPTIONS[name], child, backend="native")
        optimizer.load_state_dict(state)
        go(model, optimizer, range(2, 3))
        for param, weight in zip(model.parameters(), expected(name, (), torch.float32, "native")[0], strict=True):
            assert local(param).device.type == device
            assert same_bits(local(param).cpu(), weight), name


def scores_and_selection(rank, world, device):
    model, _ = sharded(device, world)
    scores = estimate_fisher(
        model,
        [batch(0), batch(1)],
        loss_fn=lambda model, examples: cross_entropy(model(examples[0]), examples[1]),
        grad_clip=1.0,
        progress=False,
    )
    whole = {name: local(score).cpu() for name, score in scores.items()}
    child = ChildNetwork.from_scores(model, scores, reserve_p=0.3)
    expected_child = ChildNetwork.from_scores(tiny(), whole, reserve_p=0.3)
    assert child.fingerprint == expected_child.fingerprint


CHECKS = (steps_and_checkpoints, scores_and_selection)
