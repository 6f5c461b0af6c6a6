#!/usr/bin/env bash
# accelerate does not see that a fused optimizer skipped a step, so that the schedule goes on.
#
# One would assume: `AcceleratedOptimizer.step_was_skipped`, by which accelerate and Trainer decide whether the learning rate's schedule
#   moves, is True after gradients that are not finite, whichever implementation of AdamW steps.
# What happens: it is True for AdamW(fused=False), whose step the GradScaler does not call then. A fused one is called always and
#   skips by itself, on found_inf; accelerate only notes that it was called. Weights stay, as they should; the schedule moves on.
# Versions: torch 2.13.0 (CPU), accelerate 1.15.0. Seen on 2026-11-30. Reported as huggingface/accelerate#4242.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy accelerate==1.15.0 2>/dev/null
cat >"$folder/look.py" <<'PY'
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

Accelerator(cpu=True)
for fused in (False, True):
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], fused=fused), scaler=scaler)
    scaler.scale((weight * float("inf")).sum()).backward()
    optimizer.step()
    print(fused, optimizer.step_was_skipped, bool((weight == 1).all()))
PY
found=$("$folder/env/bin/python" "$folder/look.py" 2>/dev/null)
printf '%s\n' "$found"
# Fused or not; whether the step counts as skipped; whether the weights stayed.
[ "$(paste -sd';' <<<"$found")" = "False True True;True False True" ]
