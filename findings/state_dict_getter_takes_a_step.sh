#!/usr/bin/env bash
# Asking torch.distributed.checkpoint for the state dict of a fresh optimizer changes the training that follows.
#
# One would assume: get_optimizer_state_dict reads. A checkpoint of step 0, or a look at the keys, leaves the run as it was.
# What happens: where an optimizer has no state, it is made by a step with gradients of zero and a learning rate of zero.
#   The weights stay, but the step counts are 1 from then on, and so the first real step corrects the bias of the averages
#   as if it were the second one: with the default betas AdamW moves by 0.74 learning rates instead of 1.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/look.py" <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def moved_by_first_step(look):
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, weight_decay=0.0)
    if look:
        get_optimizer_state_dict(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return round(((before - model.weight).abs().mean() / 0.125).item(), 2)


print(moved_by_first_step(False), moved_by_first_step(True))
PY
moved=$("$folder/env/bin/python" "$folder/look.py")
printf 'learning rates that the first step moves by, without and with a look at the state: %s\n' "$moved"
[ "$moved" = "1.0 0.74" ]
