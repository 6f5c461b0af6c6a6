#!/usr/bin/env bash
# Loaded by torch.distributed.checkpoint's functions, a flattened optimizer state loses what the optimizer does not have yet.
#
# One would assume: flatten_optimizer_state_dict changes the names in a checkpoint and nothing else; so what
#   set_optimizer_state_dict loads does not depend on it.
# What happens: nested, the checkpoint of an AdamW with amsgrad makes a fresh AdamW one with amsgrad, maximum included.
#   Flattened, the option is loaded and the maximum is dropped without a word, since only those values are looked up that
#   the optimizer's state has by then; the next step raises a KeyError.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/load.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
for flat in (False, True):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = torch.nn.Linear(3, 2)
    saved = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(3)).sum().backward()
    saved.step()
    saved.zero_grad()
    fresh = torch.optim.AdamW(model.parameters())
    set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, saved, options=options), options=options)
    assert fresh.param_groups[0]["amsgrad"]
    model(torch.ones(3)).sum().backward()
    try:
        fresh.step()
        print("flat" if flat else "nested", "steps")
    except KeyError as error:
        print("flat" if flat else "nested", "lacks", error)
PY
found=$("$folder/env/bin/python" "$folder/load.py" "$folder/rendezvous" 2>/dev/null)
printf '%s\n' "$found"
[ "$found" = "nested steps
flat lacks 'max_exp_avg_sq'" ]
