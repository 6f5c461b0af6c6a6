#!/usr/bin/env bash
# A checkpoint of torch.distributed.checkpoint takes plain values from one rank, and not all from the same.
#
# One would assume: what is no DTensor is saved by rank 0, as torch.save would be called there; or each rank finds its own again.
# What happens: of equal names one rank's value is kept and every rank loads that, without a word. Which rank's depends on the
#   sizes: the writers share the work evenly. Here a tensor comes from rank 0 and the number beside it from rank 1, so that a
#   state that differs by rank, such as a generator's or a step count after a fault, is one that no rank ever had.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-30.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/look.py" <<'PY'
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


def save_and_load(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dcp.save({"tensor": torch.full((3,), rank), "number": rank}, checkpoint_id=f"{folder}/checkpoint")
    found = {"tensor": torch.full((3,), -1), "number": -1}
    dcp.load(found, checkpoint_id=f"{folder}/checkpoint")
    with open(f"{folder}/{rank}", "w") as file:
        file.write(f"tensor of rank {found['tensor'][0].item()}, number of rank {found['number']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    mp.spawn(save_and_load, (folder,), nprocs=2)
    for rank in range(2):
        print(open(f"{folder}/{rank}").read())
PY
found=$("$folder/env/bin/python" "$folder/look.py" 2>/dev/null)
printf '%s\n' "$found"
# What rank 0 and rank 1 load.
[ "$(sort -u <<<"$found")" = "tensor of rank 0, number of rank 1" ]
