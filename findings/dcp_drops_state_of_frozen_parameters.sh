#!/usr/bin/env bash
# torch.distributed.checkpoint drops the saved optimizer state of parameters that are frozen when it is loaded.
#
# One would assume: with strict=True, the default, set_optimizer_state_dict restores all that get_optimizer_state_dict
#   saved, so that a run which freezes layers for a while (gradual unfreezing, alternating training) resumes exactly.
# What happens: the state dict holds step and averages of a frozen parameter that has been stepped before, in both of its
#   formats; loading leaves them out without a word. Unfrozen later, the parameter begins again with empty averages, where
#   the uninterrupted run goes on with the old ones. Optimizer.load_state_dict restores them.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/frozen.py" <<'PY'
import copy

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
model[0].requires_grad_(False)
for flat in (False, True):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    saved_step = saved["state.0.weight.step"] if flat else saved["state"]["0.weight"]["step"]
    twin = copy.deepcopy(model)
    resumed = torch.optim.AdamW(twin.parameters())
    set_optimizer_state_dict(twin, resumed, saved, options=options)
    print(int(saved_step), len(resumed.state[twin[0].weight]), len(resumed.state[twin[1].weight]))
plain = torch.optim.AdamW(model.parameters())
plain.load_state_dict(optimizer.state_dict())
print(len(plain.state[model[0].weight]))
PY
found=$("$folder/env/bin/python" "$folder/frozen.py" | paste -sd';')
printf 'steps saved, values restored of the frozen and of the other layer, in both formats; by the optimizer: %s\n' "$found"
[ "$found" = "1 0 3;1 0 3;3" ]
