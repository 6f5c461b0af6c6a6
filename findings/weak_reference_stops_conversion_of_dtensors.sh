#!/usr/bin/env bash
# A weak reference to a parameter that is a DTensor keeps its model from being converted.
#
# One would assume: weak references are invisible to what they refer to; a registry of parameters that holds only such
#   (weakref.ref, WeakKeyDictionary) can do no harm to model.to(), .half() or .double().
# What happens: Module._apply converts a plain parameter through its .data, but one of a wrapper class, as FSDP2 and
#   tensor parallelism make them, by torch.utils.swap_tensors, which refuses a tensor with weak references. The error says
#   that the parameter could not be swapped; only its cause names the reference.
# Versions: torch 2.13.0 (CPU), one process with gloo. Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/convert.py" <<'PY'
import weakref

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for wrapped in (False, True):
    for referred in (False, True):
        model = torch.nn.Linear(3, 2)
        if wrapped:
            model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        references = [weakref.ref(model.weight)] if referred else []
        try:
            model.double()
            print("DTensor" if wrapped else "plain", len(references), "converted")
        except RuntimeError as error:
            print("DTensor" if wrapped else "plain", len(references), "refused:", "weakref" in str(error.__cause__))
torch.distributed.destroy_process_group()
PY
found=$("$folder/env/bin/python" "$folder/convert.py" 2>/dev/null | paste -sd';')
printf 'kind, weak references, outcome: %s\n' "$found"
[ "$found" = "plain 0 converted;plain 1 converted;DTensor 0 converted;DTensor 1 refused: True" ]
