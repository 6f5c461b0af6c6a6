#!/usr/bin/env bash
# torch's EMA moves weights that never change, and hardly moves bfloat16 weights that do.
#
# One would assume: an exponential moving average of a constant is that constant, so that frozen weights of an averaged model
#   are the model's own, bit for bit; and of weights that differ it comes as near as the number of averages lets it.
# What happens: get_ema_avg_fn computes decay * average + (1 - decay) * weight, two products that are rounded: 15 % of float32
#   weights move by a unit in their last place though nothing has trained them. In bfloat16 a step of (1 - decay) of a small
#   difference is less than half a unit, and the average stays where it was for ever. get_ema_multi_avg_fn, which
#   AveragedModel takes by another argument, interpolates, and leaves frozen float32 weights alone.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/look.py" <<'PY'
import torch
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

torch.manual_seed(0)
weights = torch.randn(100_000)
average = get_ema_avg_fn(0.999)
moved = (average(weights, weights, 1) != weights).float().mean().item()
together = weights.clone()
get_ema_multi_avg_fn(0.999)([together], [weights], 1)

before = weights.bfloat16()
trained = (before.float() * 1.001 + 1e-4).bfloat16()
differ, mean = trained != before, before.clone()
for _ in range(2000):  # after which 86 % of a difference should be gone
    mean = average(mean, trained, 1)
reached = (mean != before)[differ].float().mean().item()
print(0.1 < moved < 0.2, torch.equal(together, weights), reached < 0.01)
print(f"frozen float32 weights that moved: {moved:.3f}; bfloat16 averages that moved towards trained weights: {reached:.4f}")
PY
found=$(HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/look.py")
printf '%s\n' "$found"
[ "${found%%$'\n'*}" = "True True True" ]
