#!/usr/bin/env bash
# Gradients that fully_shard has not reduced yet are out of zero_grad's reach, and join the next step's.
#
# One would assume: after zero_grad no gradient is left, whatever went before; so a training loop that breaks off an accumulation,
#   because a loss was not finite or an epoch ended, begins anew.
# What happens: with set_requires_gradient_sync(False) the gradients of a backward pass lie unsharded in the module, and param.grad
#   is None. zero_grad of optimizer and model sees none of them. The next backward pass that reduces adds them to its own: here
#   a gradient is twice what its batch gives.
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
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def train(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.ones(3, 4)

    def gradient():
        model(batch).sum().backward()
        grad = model.weight.grad
        return None if grad is None else grad.full_tensor()[0, 0].item()

    whole = gradient()
    optimizer.zero_grad()
    model.set_requires_gradient_sync(False)
    pending = gradient()  # and the accumulation is given up
    optimizer.zero_grad()
    model.zero_grad()
    model.set_requires_gradient_sync(True)
    again = gradient()
    if rank == 0:
        print(whole, pending, again)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(train, (os.path.join(os.path.dirname(os.path.abspath(__file__)), "store"),), nprocs=2)
PY
found=$("$folder/env/bin/python" "$folder/look.py" 2>/dev/null)
printf '%s\n' "$found"
# The gradient of a batch; what param.grad is before it is reduced; the gradient of the same batch after zero_grad.
[ "$found" = "3.0 None 6.0" ]
