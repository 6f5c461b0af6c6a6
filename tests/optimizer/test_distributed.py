"""Two processes over gloo: data-parallel replicas stay equal, a sharded parameter gets the mask of its own slice."""

import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import same_bits

from childtune_fast import ChildAdamW, ChildNetwork

WORLD = 2
STEPS = 3
BACKENDS = ("native", "torch")
OPTIONS = ({}, {"reserve_p": 1.0, "amsgrad": True})
SHAPES = ((7, 5), (4, 6), (3,), (1, 9))  # 7, 3 and 1 rows do not divide by two


def given(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def replicas_stay_equal(rank):
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
                assert all(same_bits(p, q) for q in gathered(p))


def gathered(p):
    parts = [torch.empty_like(p) for _ in range(WORLD)]
    dist.all_gather(parts, p.detach())
    return parts


def unsharded(backend, options, shapes):
    params = [torch.nn.Parameter(given(s, i)) for i, s in enumerate(shapes)]
    optimizer = ChildAdamW(params, lr=0.1, seed=3, backend=backend, **options)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = given(p.shape, 100 * step + i)
        optimizer.step()
    return params, optimizer


def shards_get_their_own_masks(rank):
    """Shard(0), evenly and unevenly, Shard(1), Replicate: put together again, the same bits as without sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    placements = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
    for backend in BACKENDS:
        for options in OPTIONS:
            for name, placement in placements.items():
                shapes = [s for s in SHAPES if len(s) == 2] if name == "columns" else SHAPES
                params = [
                    torch.nn.Parameter(distribute_tensor(given(s, i), mesh, [placement])) for i, s in enumerate(shapes)
                ]
                assert all(isinstance(p, DTensor) for p in params)
                optimizer = ChildAdamW(params, lr=0.1, seed=3, backend=backend, **options)
                for step in range(STEPS):
                    for i, p in enumerate(params):
                        p.grad = distribute_tensor(given(p.shape, 100 * step + i), mesh, [placement])
                    optimizer.step()
                expected, reference = unsharded(backend, options, shapes)
                for p, q in zip(params, expected, strict=True):
                    assert same_bits(p.full_tensor(), q), (backend, options, name, p.shape)
                    ours, theirs = optimizer.state[p], reference.state[q]
                    assert ours.keys() == theirs.keys()
                    assert all(same_bits(ours[k].full_tensor(), theirs[k]) for k in ours if k != "step")


def fsdp_equals_one_process(rank):
    """FSDP2: fully_shard on the CPU, against one process that takes the mean of both ranks' gradients."""
    from torch.distributed.fsdp import fully_shard

    for backend in BACKENDS:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        whole = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        fully_shard(model)
        optimizer = ChildAdamW(model.parameters(), lr=0.1, seed=3, backend=backend)
        alone = ChildAdamW(whole, lr=0.1, seed=3, backend=backend)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(given((4, 9), 10 * step + rank)).square().sum().backward()
            for p, q in zip(model.parameters(), whole, strict=True):
                q.grad = p.grad.full_tensor()
            optimizer.step()
            alone.step()
        for p, q in zip(model.parameters(), whole, strict=True):
            assert same_bits(p.full_tensor(), q)


def clipping_of_shards_is_refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in BACKENDS:
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        optimizer = ChildAdamW([p], max_grad_norm=1.0, backend=backend)
        with pytest.raises(ValueError, match="sharded over ranks; leave it None"):
            optimizer.step()
        assert len(optimizer.state) == 0
        assert torch.equal(p.to_local(), torch.ones(2, 3))


def child_networks_must_agree(rank):
    """One chosen by each rank's own data would let replicas drift apart: all ranks refuse it."""
    model = torch.nn.Linear(9, 5)
    for differing in (True, False):
        mask = given((5, 9), 7 + rank * differing) > 0
        child = ChildNetwork.from_masks(model, {"weight": mask})
        if differing:
            with pytest.raises(ValueError, match="all ranks must have one child network"):
                ChildAdamW(model.parameters(), child=child)
        else:
            ChildAdamW(model.parameters(), child=child)


def sharding_after_the_optimizer_was_made_is_refused(rank):
    """With the parameters put into the groups as accelerate's prepare does it; F goes on, D may not train in full."""
    from torch.distributed.fsdp import fully_shard

    for backend in BACKENDS:
        for of_d in (False, True):
            model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
            child = ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")
            optimizer = ChildAdamW(model.parameters(), backend=backend, **({"child": child} if of_d else {"seed": 3}))
            fully_shard(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
            before = [p.to_local().clone() for p in model.parameters()]
            model(given((4, 9), rank)).square().sum().backward()
            if of_d:
                for act in (optimizer.step, optimizer.state_dict):
                    with pytest.raises(ValueError, match="does not support sharded parameters"):
                        act()
            else:
                optimizer.step()
            moved = [not same_bits(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)]
            assert moved == [not of_d] * len(moved)


def each_rank_steps_a_part(rank):
    """ZeroRedundancyOptimizer: the ranks' optimizers have other parameters of one child network."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def made():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        return model, ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")

    for backend in BACKENDS:
        (model, child), (whole, same_child) = made(), made()
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=ChildAdamW, lr=0.1, backend=backend, child=child
        )
        alone = ChildAdamW(whole.parameters(), lr=0.1, backend=backend, child=same_child)
        for step in range(STEPS):
            for i, (p, q) in enumerate(zip(model.parameters(), whole.parameters(), strict=True)):
                p.grad = given(p.shape, 100 * step + i)
                q.grad = p.grad.clone()
            optimizer.step()
            alone.step()
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


CHECKS = (
    replicas_stay_equal,
    child_networks_must_agree,
    shards_get_their_own_masks,
    fsdp_equals_one_process,
    clipping_of_shards_is_refused,
    sharding_after_the_optimizer_was_made_is_refused,
    each_rank_steps_a_part,
)


def run_checks(rank, rendezvous):
    warnings.simplefilter("ignore")  # torch.distributed's own
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        for check in CHECKS:
            check(rank)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive its group and abort an interpreter that ends beside them: pytorch#179291


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_checks, args=(tmp_path / "rendezvous",), nprocs=WORLD)
