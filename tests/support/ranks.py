"""Helpers of the tests over ranks: processes that run one check after the other, and models cut in every way."""

import importlib
import os
import socket
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=2)  # that a rank waits for another: long on a busy machine, short for a deadlock


def spawn(world, modules, only=None):
    """Runs checks, one after the other, on `world` processes that are the ranks of a gloo group.

    Args:
        world: number of ranks.
        modules: {name of a module: folder, or what else its checks take}; each of its `CHECKS` is called with it, as
            (rank, world, folder).
        only: name of a check; None runs all (default: None).
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        torch.multiprocessing.spawn(_run, args=(world, rendezvous, modules, only), nprocs=world)


def _run(rank, world, rendezvous, modules, only):
    warnings.simplefilter("ignore")  # torch.distributed's own
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=PATIENCE)
    for name, folder in modules.items():
        for check in importlib.import_module(name).CHECKS:
            if only is None or check.__name__ == only:
                began = time.monotonic()
                check(rank, world, folder)
                dist.barrier()
                if rank == 0:
                    print(f"{time.monotonic() - began:6.1f} s  {world} ranks: {check.__name__}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive its group and abort an interpreter that ends beside them: pytorch#179291


def launch(run, world=2):
    """Runs `run(folder)` on processes with the environment of torchrun, from which Trainer makes its process group."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(_launched, args=(world, port, run, Path(folder)), nprocs=world)


def _launched(rank, world, port, run, folder):
    warnings.simplefilter("ignore")  # torch.distributed's own
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**ranks, **master, "OMP_NUM_THREADS": 1}.items()})
    torch.set_num_threads(1)
    run(folder)
    dist.barrier()
    os._exit(0)  # as above
