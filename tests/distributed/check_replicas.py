"""Data-parallel replicas stay equal, whatever the ranks' own random states."""

import pytest
import torch
import torch.distributed as dist
from cut_models import given
from helpers import same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from childtune_fast import ChildAdamW, ChildNetwork

STEPS = 3
BACKENDS = ("native", "torch")


def replicas_stay_equal(rank, world, folder):
    """DistributedDataParallel, ranks with other random states, other seeds asked for; rank 0's seed is taken."""
    for backend in BACKENDS:
        for seed in (None, 100 + rank):
            torch.manual_seed(1)
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(9, 5))
            torch.manual_seed(50 + rank)
            optimizer = ChildAdamW(model.parameters(), lr=0.1, seed=seed, backend=backend)
            assert optimizer.seed == (50 if seed is None else 100)
            for step in range(STEPS):
                torch.rand(rank + 1)  # random states drift apart
                optimizer.zero_grad()
                model(given((4, 9), 10 * step + rank)).square().sum().backward()
                optimizer.step()
            for p in model.parameters():
                parts = [torch.empty_like(p) for _ in range(world)]
                dist.all_gather(parts, p.detach())
                assert all(same_bits(p, part) for part in parts)


def child_networks_must_agree(rank, world, folder):
    """One chosen by each rank's own data would let replicas drift apart: all ranks refuse it."""
    model = torch.nn.Linear(9, 5)
    for differing in (True, False):
        child = ChildNetwork.from_masks(model, {"weight": given((5, 9), 7 + rank * differing) > 0})
        if differing and world > 1:
            with pytest.raises(ValueError, match="all ranks must have one child network"):
                ChildAdamW(model.parameters(), child=child)
        else:
            ChildAdamW(model.parameters(), child=child)


def stages_of_a_pipeline_may_differ(rank, world, folder):
    """Two models, each sharded over half of the ranks; within one of them, child networks must agree all the same."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    for differing in (False, True):
        model = torch.nn.Linear(9, 5 + rank // 2)
        mask = given(model.weight.shape, rank % 2 if differing else 7) > 0
        child = ChildNetwork.from_masks(model, {"weight": mask})
        fully_shard(model, mesh=mesh["data"])
        if differing:
            with pytest.raises(ValueError, match="all ranks must have one child network"):
                ChildAdamW(model.parameters(), child=child)
        else:
            optimizer = ChildAdamW(model.parameters(), child=child, max_grad_norm=1.0)
            model(given((4, 9), rank)).square().sum().backward()
            optimizer.step()


CHECKS = (replicas_stay_equal, child_networks_must_agree, stages_of_a_pipeline_may_differ)
