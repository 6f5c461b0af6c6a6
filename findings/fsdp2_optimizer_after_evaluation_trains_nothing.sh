#!/usr/bin/env bash
# An optimizer made after an evaluation of a model under fully_shard trains nothing, without a word.
#
# One would assume: once fully_shard has been applied, model.parameters() are the sharded parameters; so it does not
#   matter whether one evaluates the model before or after one makes the optimizer.
# What happens: a forward pass without a backward pass leaves the root module's parameters whole, as other tensors in
#   the place of the sharded ones. An optimizer that is made then holds those. Gradients come to the sharded parameters,
#   so it never sees one, and its steps do nothing. model.reshard() before it is made puts the sharded ones back.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/train.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
for when in ("after evaluation", "after evaluation and reshard()"):
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(3, 2))
    with torch.no_grad():
        model(torch.ones(4, 3))
    if when.endswith("reshard()"):
        model.reshard()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    print(when, "trains" if losses[2] < losses[0] else "does not train")
PY
found=$("$folder/env/bin/python" "$folder/train.py" "$folder/rendezvous" 2>/dev/null)
printf '%s\n' "$found"
[ "$found" = "after evaluation does not train
after evaluation and reshard() trains" ]
