#!/usr/bin/env bash
# ZeroRedundancyOptimizer.load_state_dict empties the checkpoint that it is given.
#
# One would assume: load_state_dict reads its argument, as torch documents for optimizers; so one checkpoint in memory
#   can be loaded twice, or kept to go back to.
# What happens: on each rank, the entries of parameters that other ranks step are set to None in the caller's own
#   dictionary, without a word. What is left is one rank's part: written to a file, or given to AdamW, it is no checkpoint.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/load.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    checkpoint = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(checkpoint, src=0)
    before = sum(state is not None for state in checkpoint[0]["state"].values())
    optimizer.load_state_dict(checkpoint[0])
    after = sum(state is not None for state in checkpoint[0]["state"].values())
    if rank == 0:
        print(f"{before} states before, {after} after", flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, args=(sys.argv[1],), nprocs=2)
PY
found=$("$folder/env/bin/python" "$folder/load.py" "$folder" 2>/dev/null)
printf '%s\n' "$found"
[ "$found" = "4 states before, 2 after" ]
